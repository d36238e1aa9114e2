"""How much each trained step adds to the gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class StepGradientNorms:
    """Measures the gradient of each trained step alone: an ``after_step`` of the replay engine.

    Costs a copy of the gradients. On several ranks it sees what each rank has in ``.grad``.

    Args:
        parameters: The trained weights.

    Attributes:
        norms: Euclidean norm by step index, a tensor each (no wait for the device); micro-steps of
            an accumulated gradient overwrite each other.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [weight for weight in parameters if weight.requires_grad]
        self._before = self._gradients()
        self.norms: dict[int, Tensor] = {}

    def __call__(self, step_index: int) -> None:
        """Measure what was added since the last call."""
        now = self._gradients()
        added = [
            torch.linalg.vector_norm(gradient - before)
            for gradient, before in zip(now, self._before, strict=True)
        ]
        self.norms[step_index] = torch.linalg.vector_norm(torch.stack(added))
        self._before = now

    def _gradients(self) -> list[Tensor]:
        return [
            torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
            for weight in self._parameters
        ]
