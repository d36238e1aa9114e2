"""Learning-rate schedules that work for any number of steps."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class _WarmupLR(LambdaLR):
    """Linear warm-up, then a decay to zero."""

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> None:
        self.total_steps = max(1, total_steps)
        self.warmup_steps = min(warmup_steps, self.total_steps // 2)
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        rest = max(1, self.total_steps - self.warmup_steps)
        return self._decay(min(1.0, (step - self.warmup_steps) / rest))

    def _decay(self, progress: float) -> float:
        """Map progress from 0 to 1 to a factor from 1 to 0."""
        raise NotImplementedError


class WarmupCosineLR(_WarmupLR):
    """Linear warm-up, then half a cosine down to zero.

    Args:
        optimizer: Its rates are the peaks.
        total_steps: Optimizer steps of the run, at least 1.
        warmup_steps: Steps of the warm-up; less if the run is shorter.
    """

    def _decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class WarmupLinearLR(_WarmupLR):
    """Linear warm-up, then a straight line down to zero.

    Args:
        optimizer: Its rates are the peaks.
        total_steps: Optimizer steps of the run, at least 1.
        warmup_steps: Steps of the warm-up; less if the run is shorter.
    """

    def _decay(self, progress: float) -> float:
        return 1 - progress
