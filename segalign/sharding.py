"""Networks sharded over ranks by FSDP2, block by block; everything else stays whole.

Calling a block is a collective: all ranks must make equally many calls, in the same order, and
never in inference mode. A sharded weight is a ``DTensor`` between the calls of its block.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from segalign.errors import ConfigError

# Blocks of networks that do not name theirs, as diffusers and transformers do.
_OTHER_BLOCKS = frozenset({"ResidualAttentionBlock"})


def data_parallel_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the dimension of a mesh over which samples, and here weights, are shared.

    Args:
        mesh: One dimension, or named ones as Lightning's: ``data_parallel``, ``tensor_parallel``.

    Raises:
        ConfigError: If another dimension has more than one rank.
    """
    if mesh.ndim == 1:
        return mesh
    data = mesh["data_parallel"]
    if data.size() != mesh.size():
        raise ConfigError(
            "expected ranks that all share the data; got a mesh of "
            f"{dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))}; leave tensor "
            "parallelism out, as configs/base/fsdp.yaml does"
        )
    return data


def shard_backbone(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network whose forward is called, each block in a group of its own, in place.

    A group holds what is frozen and what is trained of a block, and is gathered by one collective.
    Adapters of another precision than their base have a group of their own, one for each block.

    Args:
        network: A network of diffusers, transformers or ``open_clip``, in its final precision,
            with its adapters, and with ``requires_grad`` set.
        mesh: The ranks, one-dimensional. The first one's weights and buffers become those of all.
    """
    names = _block_names(network)
    _copy_module(network, mesh)
    _shard([*_blocks(network, names), network], mesh)


def shard_trained_layers(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Shard the layers of those towers of a model that are trained, wholly or in part, in place.

    What is around the layers stays whole, for towers are not called by the model's own forward:
    embeddings, norms, projections and the temperature.

    Args:
        model: A model of two towers, of transformers or ``open_clip``.
        mesh: The ranks, one-dimensional. The first one's layers become those of all.

    Returns:
        The stacks of layers that are sharded.
    """
    names = _block_names(model)
    stacks = [module for module in model.modules() if _is_trained_stack(module, names)]
    for stack in stacks:
        _copy_module(stack, mesh)
        _shard([*_blocks(stack, names), stack], mesh)
    return stacks


def is_sharded(module: nn.Module) -> bool:
    """Tell whether a module has sharded parts."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextlib.contextmanager
def kept_whole(network: nn.Module) -> Iterator[None]:
    """Keep the blocks of a network whole after their first call, until the end of a block of code.

    So many calls without gradient gather the weights once; the memory is that of the whole
    network. Weights must not change inside. Does nothing for a network that is not sharded.
    """
    parts = [part for part in network.modules() if isinstance(part, FSDPModule)]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


@torch.no_grad()
def copy_from_first_rank(tensors: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give all ranks the first one's tensors, as DDP does; sharded ones are left alone."""
    group = mesh.get_group()
    first = distributed.get_global_rank(group, 0)
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            continue
        sent = tensor.detach().to(mesh.device_type).contiguous()
        distributed.broadcast(sent, first, group=group)
        tensor.copy_(sent)


def _copy_module(module: nn.Module, mesh: DeviceMesh) -> None:
    """Copy a module from the first rank, lest shards of different models meet."""
    copy_from_first_rank(chain(module.parameters(), module.buffers()), mesh)


def _block_names(network: nn.Module) -> frozenset[str]:
    """Name the classes of the parts that are called as one, by what libraries say of them."""
    named: set[str] = set()
    for module in network.modules():
        named.update(getattr(module, "_no_split_modules", None) or ())
    return frozenset(named) | _OTHER_BLOCKS


def _blocks(network: nn.Module, names: frozenset[str]) -> list[nn.Module]:
    """Find the blocks below a network, inner ones first."""
    found = [module for module in network.modules() if type(module).__name__ in names]
    return [block for block in reversed(found) if block is not network]


def _is_trained_stack(module: nn.Module, names: frozenset[str]) -> bool:
    """Tell whether a module runs a list of blocks, and something in it is trained."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    members = [member for one in lists for member in one]
    is_stack = any(type(member).__name__ in names for member in members)
    return is_stack and any(weight.requires_grad for weight in module.parameters())


def _shard(modules: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Make a group of each module's weights that are in no group yet, inner modules first."""
    grouped: set[nn.Module] = set()
    for module in modules:
        factors = [factor for factor in _wide_factors(module) if factor not in grouped]
        grouped.update(factors)
        if factors:
            fully_shard(factors, mesh=mesh, reshard_after_forward=True)
        # Also of the outermost one: between calls, no weight is to be whole.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _wide_factors(module: nn.Module) -> Iterator[nn.Module]:
    """Find the factors of adapters in another precision than the weight that they adapt."""
    for layer in module.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = cast("Tensor", layer.get_base_layer().weight)
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            if cast("Tensor", factor.weight).dtype != base.dtype:
                yield factor
