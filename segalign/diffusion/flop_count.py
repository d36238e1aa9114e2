"""FLOPs of networks, counted on the meta device: nothing is computed and no weight is read.

One multiplication with addition is 2 FLOPs; matrix products, convolutions and attention count.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

META: Final = torch.device("meta")


def count_flops(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    backward: bool,
    networks: Sequence[nn.Module] | None = None,
) -> float:
    """Count the FLOPs of a function of networks, without their weights.

    Args:
        function: A module, a method of one, or with ``networks`` anything that calls them. It must
            not look at values.
        inputs: Tensors on the meta device.
        backward: Count the backward pass alone, from the sum of the output to the inputs and
            weights that require a gradient, instead of the forward pass.
        networks: The modules that are called.
    """
    ran = run_on_meta(function, inputs, networks)
    if not backward:
        return ran.flops
    wanted = [tensor for tensor in (*inputs, *ran.weights) if tensor.requires_grad]
    return backward_flops(ran.output, wanted)


class MetaRun(NamedTuple):
    """What a forward pass gave; tensors are on the meta device.

    Attributes:
        flops: FLOPs of the forward pass.
        output: The output, with its graph.
        weights: What stood for the networks' weights; they require a gradient where those do.
    """

    flops: float
    output: Tensor
    weights: list[Tensor]


class _Calling(nn.Module):
    """A function and the modules that it calls, so that their weights can be replaced."""

    def __init__(self, function: Callable[..., Tensor], networks: Sequence[nn.Module]) -> None:
        super().__init__()
        # Not registered twice, should it be a module itself.
        self._functions = [function]
        self.networks = nn.ModuleList(networks)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the function."""
        output: Tensor = self._functions[0](*inputs)
        return output


def run_on_meta(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    networks: Sequence[nn.Module] | None = None,
) -> MetaRun:
    """Run a function forward, meta tensors in place of its networks' weights."""
    if networks is None:
        owner = getattr(function, "__self__", function)
        networks = [owner] if isinstance(owner, nn.Module) else []
    calling = _Calling(function, networks)
    weights = {
        name: torch.empty_like(weight, device=META, requires_grad=weight.requires_grad)
        for name, weight in calling.named_parameters()
    }
    buffers = {
        name: torch.empty_like(buffer, device=META) for name, buffer in calling.named_buffers()
    }
    with _checkpointing_off(calling), torch.enable_grad(), FlopCounterMode(display=False) as count:
        output = functional_call(calling, {**weights, **buffers}, tuple(inputs))
    return MetaRun(float(count.get_total_flops()), output, list(weights.values()))


def backward_flops(output: Tensor, wanted: Sequence[Tensor]) -> float:
    """Count the backward pass from the sum of an output to some tensors."""
    with FlopCounterMode(display=False) as count:
        torch.autograd.grad(output.sum(), list(wanted), allow_unused=True)
    return float(count.get_total_flops())


def forward_and_backward(function: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Count a function of frozen networks, forward and back to its input."""
    ran = run_on_meta(function, (images,))
    return ran.flops + backward_flops(ran.output, [images])


@contextlib.contextmanager
def _checkpointing_off(module: nn.Module) -> Iterator[None]:
    """Keep networks from recomputing their activations."""
    parts: list[Any] = [
        part for part in module.modules() if getattr(part, "gradient_checkpointing", False)
    ]
    try:
        for part in parts:
            part.gradient_checkpointing = False
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True
