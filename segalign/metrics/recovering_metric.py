"""A torchmetrics metric that a refused computation does not spoil."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from segalign.errors import DataError
from segalign.metrics.first_rank import on_first_rank


class TooFewImagesError(DataError):
    """There are too few images for a number, on every rank alike; it can be had with more."""


class RecoveringMetric(Metric):
    """Base of metrics that refuse what they cannot compute, and can go on after that.

    In torchmetrics an error in ``compute`` leaves the states of all ranks summed up, or, inside
    ``forward``, loses all earlier batches.

    Args:
        settings: Those of ``torchmetrics.Metric``.
    """

    full_state_update = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the value of a batch alone, and add the batch to the earlier ones once.

        Raises:
            DataError: If the batch alone has no value; then nothing is added.
        """
        states = {name: getattr(self, name) for name in self._defaults}
        count = self._update_count
        for name, default in self._defaults.items():
            fresh = default.clone().to(self.device) if isinstance(default, Tensor) else list[Any]()
            setattr(self, name, fresh)
        self._to_sync = self.dist_sync_on_step
        try:
            self.update(*args, **kwargs)
            value = self.compute()
        finally:
            for name, state in states.items():
                setattr(self, name, state)
            self._to_sync, self._update_count, self._computed = self.sync_on_compute, count, None
        self.update(*args, **kwargs)
        self._forward_cache = value
        return value

    @override
    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable[..., Any] | None = None,
    ) -> Iterator[None]:
        """Join the ranks inside the block; the states are those of this rank again after it."""
        self.sync(dist_sync_fn, process_group, should_sync, distributed_available)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def computed_once(self, function: Callable[[], Tensor], count: int) -> Tensor:
        """Return ``count`` float64 numbers, by the first rank where ranks are joined."""
        if self._is_synced:
            return on_first_rank(function, count, self.process_group).to(self.device)
        return function().to(self.device)
