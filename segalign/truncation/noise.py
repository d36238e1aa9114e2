"""The noise of a rollout.

Dims: B batch, T steps, c/h/w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from segalign.rng import counter_normal


class RolloutNoise(Protocol):
    """Standard normal noise ``(B, c, h, w)``; asked for twice, it is the same."""

    def initial(self) -> Tensor:
        """Return the noise that the run starts from."""

    def of_step(self, step_index: int) -> Tensor:
        """Return the noise that a step injects, 0 = noisiest."""

    def of_copy(self, copy_index: int) -> Tensor:
        """Return the noise of a re-noised copy of the clean latents."""


@dataclass(frozen=True, kw_only=True)
class CounterNoise:
    """Noise that depends on seed, optimizer step and sample id alone.

    Args:
        seed: Seed of the run.
        step: The optimizer step.
        sample_ids: ``B`` ids, so that a sample has the same noise on any rank and in any batch.
        latent_shape: (c, h, w).
        device: Where the noise goes; it is drawn on the CPU.
        dtype: Number type of the noise; it is drawn in float32.
    """

    seed: int
    step: int
    sample_ids: Sequence[int]
    latent_shape: tuple[int, int, int]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def initial(self) -> Tensor:
        """Return the noise that the run starts from."""
        return self._draw("rollout")

    def of_step(self, step_index: int) -> Tensor:
        """Return the noise that a step injects."""
        return self._draw("rollout.step", step_index)

    def of_copy(self, copy_index: int) -> Tensor:
        """Return the noise of a re-noised copy."""
        return self._draw("rollout.copy", copy_index)

    def select(self, rows: range) -> "CounterNoise":
        """Take the noise of some samples; that of the others is not drawn."""
        return replace(self, sample_ids=[self.sample_ids[row] for row in rows])

    def _draw(self, purpose: str, *counters: int) -> Tensor:
        rows = [(self.seed, self.step, int(sample), *counters) for sample in self.sample_ids]
        return counter_normal(purpose, rows, self.latent_shape).to(self.device, self.dtype)


def select_rows(noise: RolloutNoise, rows: range) -> RolloutNoise:
    """Take some rows of a noise.

    Args:
        noise: The noise of the batch. One with a method ``select`` makes that of the rows alone;
            of any other, the whole batch's is made each time.
        rows: Which rows.
    """
    select: Any = getattr(noise, "select", None)
    if select is None:
        return _SomeRows(noise, slice(rows.start, rows.stop, rows.step))
    selected: RolloutNoise = select(rows)
    return selected


@dataclass(frozen=True)
class _SomeRows:
    """Some rows of another noise."""

    noise: RolloutNoise
    rows: slice

    def initial(self) -> Tensor:
        return self.noise.initial()[self.rows]

    def of_step(self, step_index: int) -> Tensor:
        return self.noise.of_step(step_index)[self.rows]

    def of_copy(self, copy_index: int) -> Tensor:
        return self.noise.of_copy(copy_index)[self.rows]
