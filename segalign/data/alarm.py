"""An error that one process has found, raised by all of them at the same step."""

import json
from typing import Any, Final

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

from segalign.errors import DataError
from segalign.ranks import is_distributed, own_rank, world_size

_KEY: Final = "segalign/data/alarm"


class Alarm:
    """Tell the other ranks of an error without a collective of its own.

    A rank that raised an error by itself would leave the others waiting in their next collective.
    It goes on with its step instead and tells the store that the processes have in common; all
    look there when they begin a step. Because a training step ends with a collective, nobody
    begins the next one before the error was told: there, all raise it.
    """

    def __init__(self) -> None:
        self._looked_at = -1
        self._told: tuple[int, str] | None = None
        self._raised: DataError | None = None

    def silence(self) -> None:
        """Forget the error of an earlier run; every rank calls it before the steps begin."""
        self._looked_at, self._told, self._raised = -1, None, None
        if is_distributed() and own_rank() == 0:
            _store().delete_key(_KEY)

    def tell(self, error: DataError, step: int) -> None:
        """Make all ranks raise an error at the step after this one; alone, raise it now.

        Args:
            error: What was found.
            step: Optimizer steps taken, the same number on all ranks in the same step.

        Raises:
            DataError: The error itself, if there is one process.
        """
        if world_size() == 1:
            self._raised = error
            raise error
        if self._told is None:
            told = json.dumps([step + 1, str(error)])
            self._hear(_store().compare_set(_KEY, "", told))

    def tell_later(self, error: DataError, step: int) -> None:
        """Raise an error that all ranks know at the next batch of a training."""
        if self._told is None:
            self._told = (step, str(error))

    def raise_if_told(self, step: int) -> None:
        """Raise what some rank has told; called with every batch, it looks once in a step.

        Raises:
            DataError: On all ranks the same.
        """
        if self._told is None and step != self._looked_at and world_size() > 1:
            self._looked_at = step
            if _store().check([_KEY]):
                self._hear(_store().get(_KEY))
        if self._told is not None and step >= self._told[0]:
            self._raised = DataError(self._told[1])
            raise self._raised

    def has_raised(self, error: BaseException) -> bool:
        """Tell whether all ranks have raised this error."""
        return error is self._raised

    def _hear(self, told: bytes) -> None:
        step, message = json.loads(told)
        self._told = (step, message)


def _store() -> Any:
    assert distributed.is_initialized()
    return _get_default_store()
