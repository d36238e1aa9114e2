"""The samples of an optimizer step on this rank, over all of its micro-batches."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class StepSamples:
    """How many samples there are, how many count, and whose losses are not finite.

    Attributes:
        num_rows: How many there are, whether they count or not.
        counts: How many count, and how many of those have a loss that is not finite: ``(2,)``, on
            the device; None before the first micro-batch.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.counts: Tensor | None = None
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, losses: Tensor, batch: Mapping[str, Any]) -> None:
        """Add the losses ``(B,)`` of a micro-batch; does not wait for the device."""
        valid: Tensor = batch["valid"]
        is_bad = valid & ~losses.detach().isfinite()
        counts = torch.stack([valid.sum(), is_bad.sum()])
        self.num_rows += len(valid)
        self.counts = counts if self.counts is None else self.counts + counts
        self._found.append((batch["sample_ids"], valid, is_bad))

    def ids(self) -> list[int]:
        """List the samples that count; waits for the device."""
        return [one for ids, valid, _ in self._found for one in ids[valid].tolist()]

    def bad_ids(self) -> list[int]:
        """List those whose losses are not finite; waits for the device."""
        return [one for ids, _, is_bad in self._found for one in ids[is_bad].tolist()]


def correct_mean(trained: Iterable[nn.Parameter], num_rows: int, num_valid: int) -> None:
    """Turn the gradient of a mean over all rows into that of the mean over those that count."""
    for weight in trained:
        if weight.grad is not None:
            # Two whole numbers, so that the correction is exact in the gradient's own dtype.
            weight.grad.mul_(num_rows).div_(max(num_valid, 1))
