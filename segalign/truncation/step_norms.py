"""How much each trained step adds to the gradient."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class StepObserver(Protocol):
    """Looks at the gradient while trained steps add to it."""

    def restart(self) -> None:
        """Leave out what is in ``.grad`` now."""
        ...

    def __call__(self, step_index: int) -> None:
        """Look at what a trained step has added: see ``after_step`` of the engines."""
        ...


class StepGradientNorms:
    """Measures the gradient of each trained step alone: an ``after_step`` of the replay engine.

    Costs a copy of the gradients. On several ranks it sees what each rank has in ``.grad``. Of a
    batch that is sampled in parts it is to see one part, after a `restart`: the norms of parts do
    not add up to that of their sum.

    Args:
        parameters: The trained weights. Until a `restart`, their gradients count from 0.

    Attributes:
        norms: Euclidean norm by step index since the last `restart`, a tensor each (no wait for
            the device).
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [weight for weight in parameters if weight.requires_grad]
        self._before: list[Tensor | None] = [None] * len(self._parameters)
        self.norms: dict[int, Tensor] = {}

    def restart(self) -> None:
        """Measure from the gradients that there are now."""
        self._before = [
            None if weight.grad is None else weight.grad.detach().clone()
            for weight in self._parameters
        ]
        self.norms = {}

    def __call__(self, step_index: int) -> None:
        """Measure what was added since the last call."""
        norms = [self._measure(place) for place in range(len(self._parameters))]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        self.norms[step_index] = torch.linalg.vector_norm(torch.stack(norms))

    def _measure(self, place: int) -> Tensor:
        """Return the norm of what a weight's gradient has grown by, and remember the gradient."""
        weight, before = self._parameters[place], self._before[place]
        if weight.grad is None:
            return weight.new_zeros(())
        gradient = weight.grad.detach()
        if before is None:
            self._before[place] = gradient.clone()
            norm: Tensor = torch.linalg.vector_norm(gradient)
            return norm
        norm = torch.linalg.vector_norm(before.sub_(gradient))
        before.copy_(gradient)
        return norm
