"""Rows of a log that wait where they cannot be written, and are asked for where that is safe."""

import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl

_logger = logging.getLogger(__name__)


class Patience:
    """Lets a log that cannot be written wait, and says so when that begins."""

    def __init__(self) -> None:
        self._is_told = False

    def try_to(self, write: Callable[[], None]) -> None:
        """Write, or say once why that is not possible."""
        try:
            write()
        except OSError as error:
            if not self._is_told:
                _logger.warning("rows of the log wait until the next checkpoint: %s", error)
            self._is_told = True
        else:
            self._is_told = False


@runtime_checkable
class KeepsRows(Protocol):
    """A logger whose rows wait while they cannot be written.

    Lightning saves loggers on rank 0 alone and in the middle of a step, where an error would leave
    the other ranks waiting; so ``Logger.save`` never fails, and this is asked for certainty.
    """

    def flush_all(self) -> None:
        """Force all rows to disk.

        Raises:
            StorageError: If that cannot be done; they go on waiting.
        """


def flush_logs(trainer: pl.Trainer) -> None:
    """Force what the loggers hold to disk; only where an error reaches all ranks.

    Raises:
        StorageError: If that cannot be done; it goes on waiting.
    """
    for logger in trainer.loggers:
        if isinstance(logger, KeepsRows):
            logger.flush_all()
        else:
            logger.save()
