"""Gradients of all ranks made one, and clipped; also where weights are sharded."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segalign.ranks import is_distributed
from segalign.sharded_tensors import local


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average ``.grad`` over all ranks, by one collective for each number type.

    Sharded gradients are left alone: those are reduced where they are computed.

    Args:
        parameters: The trained weights, the same on all ranks.
    """
    if not is_distributed():
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in _gradients(parameters):
        if not isinstance(gradient, DTensor):
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        _average_flat(gradients)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale ``.grad`` down where its Euclidean norm, over all weights and shards, is too long.

    Args:
        parameters: The trained weights.
        max_norm: Longest norm; None leaves gradients alone.

    Returns:
        The norm before clipping, a scalar, the same on all ranks; not finite if a gradient is not.
    """
    groups = _by_sharding(parameters)
    norms = [_total_norm(group) for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if max_norm is not None:
        for group in groups:
            clip_grads_with_norm_(group, max_norm, norm)
    return norm


@torch.no_grad()
def clip_gradient_values(parameters: Iterable[nn.Parameter], bound: float) -> None:
    """Bound each element of ``.grad`` to [-bound, bound], in each rank's own shards.

    Args:
        parameters: The trained weights.
        bound: Largest absolute value, above 0.
    """
    for gradient in _gradients(parameters):
        local(gradient).clamp_(-bound, bound)


def _by_sharding(parameters: Sequence[nn.Parameter]) -> list[Sequence[nn.Parameter]]:
    """Part weights that are sharded from those that are whole: no operation takes both."""
    moved = [weight for weight in parameters if weight.grad is not None]
    sharded = [weight for weight in moved if isinstance(weight.grad, DTensor)]
    whole = [weight for weight in moved if not isinstance(weight.grad, DTensor)]
    return [group for group in (whole, sharded) if group] or [parameters]


def _total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    norm = get_total_norm(_gradients(parameters))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [weight.grad for weight in parameters if weight.grad is not None]


def _average_flat(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
