"""How much text an epoch lost: counted per sample, summed over ranks, logged once per epoch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segalign.text.conditioning import TextReport

Reduce = Callable[[Tensor, str], Tensor]
NAMES = ("num_captions", "num_segments", "cut_segments", "kept_tokens", "dropped_tokens")


class TextTotals:
    """Sums of text reports for each epoch of the data.

    A step may straddle two epochs, so counts belong to the epoch of their sample. Ranks agree
    only when `flush` is called, which must happen on all of them at the same step. What belongs to
    an optimizer step that is under way counts from `commit` on: a run that is stopped before
    that repeats the step.
    """

    def __init__(self) -> None:
        self._under_way: list[tuple[int, list[int]]] = []
        self._own: dict[int, list[int]] = {}
        self._shared: dict[int, list[int]] = {}

    def add(self, report: TextReport, epochs: Sequence[int], valid: Sequence[bool]) -> None:
        """Note the captions of one batch of this rank; invalid rows do not count."""
        columns = [getattr(report, name) for name in NAMES[1:]]
        for epoch, is_valid, *counts in zip(epochs, valid, *columns, strict=True):
            if is_valid:
                self._under_way.append((epoch, [1, *counts]))

    def commit(self) -> None:
        """Count what was added: its optimizer step is whole."""
        added, self._under_way = self._under_way, []
        for epoch, counts in added:
            sums = self._own.setdefault(epoch, [0] * len(NAMES))
            self._own[epoch] = [a + b for a, b in zip(sums, counts, strict=True)]

    def flush(self, reduce: Reduce, *, ended: bool = False) -> dict[int, dict[str, int]]:
        """Sum over ranks, and hand out the epochs that are over.

        Args:
            reduce: Sums (``"sum"``) or maximises (``"max"``) an int64 tensor over ranks.
            ended: Hand out the unfinished epoch too.

        Returns:
            Totals by name for each epoch that is over.
        """
        seen = [*self._own, *self._shared]
        bounds = torch.tensor([-min(seen, default=2**60), max(seen, default=-1)])
        first, last = (int(bound) for bound in reduce(bounds, "max"))
        first = -first
        for epoch in range(first, last + 1):
            own = torch.tensor(self._own.get(epoch, [0] * len(NAMES)))
            before = self._shared.get(epoch, [0] * len(NAMES))
            added = reduce(own, "sum").tolist()
            self._shared[epoch] = [a + b for a, b in zip(before, added, strict=True)]
        self._own = {}
        if ended:
            self._under_way = []
        over = [epoch for epoch in sorted(self._shared) if ended or epoch < last]
        return {epoch: dict(zip(NAMES, self._shared.pop(epoch), strict=True)) for epoch in over}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over ranks as of the last `flush`."""
        return {str(epoch): counts for epoch, counts in self._shared.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved sums."""
        self._under_way, self._own = [], {}
        self._shared = {int(epoch): list(counts) for epoch, counts in state.items()}
