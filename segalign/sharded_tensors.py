"""Tensors that are sharded over ranks: made whole to be saved, and cut to be loaded."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; a whole one as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor whole; one that is not sharded as it is. A collective.

    A sharded tensor comes back on the CPU, and of the first rank alone, which writes it: to spare
    memory, others get an empty one.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = cast("DTensor", tensor.detach()).full_tensor()
    return whole.cpu() if distributed.get_rank() == 0 else whole.new_empty(0, device="cpu")


def gathered_tree(tree: Any) -> Any:
    """Make the tensors of nested dicts, lists and tuples whole, see `gathered`. A collective."""
    if isinstance(tree, Tensor):
        return gathered(tree)
    if isinstance(tree, Mapping):
        return {key: gathered_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered_tree(value) for value in tree)
    return tree


def sharded_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Cut a whole tensor as another one is cut; no collective.

    Args:
        tensor: The same whole tensor on all ranks.
        pattern: A tensor of its shape; if it is whole, ``tensor`` is returned.
    """
    if not isinstance(pattern, DTensor) or isinstance(tensor, DTensor):
        return tensor
    whole = tensor.to(pattern.device)
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Write a tensor, whole or cut alike, over one that may be sharded."""
    local(target).copy_(local(sharded_like(source, target)))


@contextlib.contextmanager
def weights_apart(optimizer: Optimizer) -> Iterator[None]:
    """Part each group of an optimizer into whole and sharded weights, for a block of code: a step.

    No operation takes both at once, as those of ``foreach``, CUDA's default, and ``fused`` do. In
    between the groups are as they were made, for schedules and checkpoints to see.
    """
    groups = optimizer.param_groups
    parts = [_parts(group) for group in groups]
    optimizer.param_groups = [part for group in parts for part in group]
    try:
        yield
    finally:
        optimizer.param_groups = groups
        for group, own in zip(groups, parts, strict=True):
            # What a step counts in its group, it counts in each part.
            group.update({name: value for name, value in own[-1].items() if name != "params"})


def _parts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Part a group by how its weights lie; it comes back itself where they are alike."""
    weights = group["params"]
    whole = [weight for weight in weights if not isinstance(weight, DTensor)]
    if len(whole) in (0, len(weights)):
        return [group]
    sharded = [weight for weight in weights if isinstance(weight, DTensor)]
    return [{**group, "params": part} for part in (whole, sharded)]


def sharded_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the whole state of an optimizer as its weights are cut.

    Args:
        optimizer: Its weights may be sharded.
        state: A ``state_dict`` of whole tensors, the same on all ranks.

    Returns:
        The same with what has a weight's shape sharded like the weight.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {**state, "state": {
        number: {name: _cut(value, weights[number]) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }}  # fmt: skip


def _cut(value: Any, weight: Tensor) -> Any:
    is_alike = isinstance(value, Tensor) and value.shape == weight.shape
    return sharded_like(value, weight).clone() if is_alike else value
