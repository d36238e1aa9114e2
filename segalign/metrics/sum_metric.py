"""Metrics whose states are sums of whole numbers: exact for any order, chunks and ranks.

Dims: B rows of a batch, N samples there can be.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, distributed
from torchmetrics import Metric
from typing_extensions import override

from segalign.errors import DataError
from segalign.metrics.fixed_point import MAX_WHOLE
from segalign.metrics.host_gather import transport_device
from segalign.metrics.recovering_metric import RecoveringMetric


class SumMetric(RecoveringMetric):
    """Base of metrics of sums, in which every sample counts once.

    States are int64, or float64 holding whole numbers below 2^53. torchmetrics would gather every
    state of every rank on every rank; here all of them travel as one vector of int64, summed by one
    all-reduce. A rank that has seen nothing takes part.

    Samples are told apart by ids in [0, N). How often each was counted is a state like the others:
    an id that comes again on one rank changes nothing, and one that two ranks have counted shows as
    2 in the sum. N is needed for that; no state of fixed size could tell for unknown ids.

    Args:
        settings: Those of ``torchmetrics.Metric``; ``dist_sync_fn`` is not used.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._id_states: list[str] = []

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        """Add a state, zeros at first, int64 or float64."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def add_ids(self, name: str, num_samples: int) -> None:
        """Add a state that knows which of N samples have been counted."""
        self.add_sum(name, num_samples)
        self._id_states.append(name)

    def new_rows(self, name: str, sample_ids: Tensor, counted: Tensor) -> Tensor:
        """Find the rows that this rank counts now; nothing is changed.

        Args:
            name: The state that knows the ids.
            sample_ids: int64 ``(B,)``, any device.
            counted: bool ``(B,)``; the other rows, such as padding, are left out.

        Returns:
            Row numbers in rising order, int64, on the CPU: the first row of each new id.

        Raises:
            DataError: If an id is out of range.
        """
        seen: Tensor = getattr(self, name)
        ids, rows = sample_ids.cpu(), counted.cpu().nonzero().flatten()
        own = ids[rows]
        if (wrong := own[(own < 0) | (own >= len(seen))]).numel():
            raise DataError(
                f"expected sample ids below {len(seen)}, the number of samples; got "
                f"{int(wrong[0])}; number samples from 0, or raise the number of samples"
            )
        rows = rows[seen[own.to(seen.device)].cpu() == 0]
        distinct, owner = torch.unique(ids[rows], return_inverse=True)
        first = torch.full((len(distinct),), len(ids)).scatter_reduce(0, owner, rows, "amin")
        return first.sort().values

    def mark(self, name: str, sample_ids: Tensor) -> None:
        """Note that new samples have been counted, each once."""
        seen: Tensor = getattr(self, name)
        setattr(self, name, seen.index_fill(0, sample_ids.to(seen.device), 1))

    @override
    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the states of another metric, or a dictionary of them.

        Raises:
            DataError: If both have counted the same sample; then nothing is changed.
        """
        others = (
            incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        )
        for name in self._id_states:
            _check_once(getattr(self, name) + others[name])
        super().merge_state(incoming_state)

    @override
    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Do nothing: in another type sums would no longer be exact."""
        return self

    @override
    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any | None = None
    ) -> None:
        """Sum the states of all ranks; nothing is changed if they cannot be.

        Raises:
            DataError: On every rank, if two have counted one sample, or sums are not exact.
        """
        states: dict[str, Tensor] = {name: getattr(self, name) for name in self._reductions}
        group = process_group or self.process_group
        sums = all_reduce_whole(states, group)
        for name in self._id_states:
            _check_once(sums[name])
        for name, total in sums.items():
            setattr(self, name, total)


def all_reduce_whole(states: dict[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    """Sum whole numbers over ranks, by one all-reduce of int64.

    Args:
        states: By name, int64, or float64 with whole numbers below 2^53; equal shapes on all ranks.
        group: Process group; None is that of all ranks.

    Returns:
        The sums, of the same types and on the same devices.

    Raises:
        DataError: On every rank, if numbers of one are not whole, or a sum leaves float64's range.
    """
    is_wrong = torch.tensor([not all(_is_exact(state) for state in states.values())])
    parts = [is_wrong, *states.values()]
    device = transport_device(group)
    flat = torch.cat([part.reshape(-1).to(device, torch.int64) for part in parts])
    distributed.all_reduce(flat, group=group)
    pieces = torch.split(flat, [part.numel() for part in parts])
    floats = [
        piece
        for piece, state in zip(pieces[1:], states.values(), strict=True)
        if state.is_floating_point()
    ]
    if pieces[0].item() or any((piece.abs() > MAX_WHOLE).any().item() for piece in floats):
        raise DataError(
            "expected sums of whole numbers below 2^53 on every rank; got others; lower "
            "`grid_bits` of the reference statistics, or take fewer images"
        )
    return {
        name: piece.view(state.shape).to(state.device, state.dtype)
        for (name, state), piece in zip(states.items(), pieces[1:], strict=True)
    }


def _is_exact(state: Tensor) -> bool:
    if not state.is_floating_point():
        return True
    return bool(((state == state.round()) & (state.abs() <= MAX_WHOLE)).all())


def _check_once(times_counted: Tensor) -> None:
    """Refuse samples that have been counted more than once.

    Raises:
        DataError: If there are such.
    """
    if (again := (times_counted > 1).nonzero().flatten()).numel():
        raise DataError(
            f"expected every sample to be counted by one rank; {len(again)} were by several, first "
            f"{int(again[0])}; deal samples out to ranks once, and mask padding"
        )
