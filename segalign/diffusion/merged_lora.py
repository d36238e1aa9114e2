"""Low-rank adapters merged into weights: for good, or into stand-ins beside the network."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from segalign.diffusion.stand_ins import Places
from segalign.formats.lora_pairs import add_pairs


def merge_layer(layer: BaseTunerLayer) -> None:
    """Add a layer's active adapters to its base weight, in place, in float32 or wider.

    What is more than up times down (DoRA, biases) is left to PEFT, which rounds to the weight's
    type at each step.
    """
    if not (isinstance(layer, LoraLayer) and is_plain(layer)):
        layer.merge()
        return
    with torch.no_grad():
        cast("Tensor", layer.get_base_layer().weight).copy_(merged_weight(layer))


def merged_weight(layer: LoraLayer) -> Tensor:
    """Form the weight of a plain layer with its active adapters added.

    Returns:
        The base weight itself where no adapter is active, or else a new tensor of its type: formed
        in float32 or wider and rounded once. No gradient.
    """
    base = cast("Tensor", layer.get_base_layer().weight)
    pairs = [_pair(layer, name) for name in _active(layer)]
    return add_pairs(base, pairs) if pairs else base.detach()


def is_plain(layer: LoraLayer) -> bool:
    """Tell whether a layer's active adapters are up times down and nothing else."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | nn.Conv2d) or getattr(base, "groups", 1) != 1:
        return False
    return not any(name in layer.lora_variant or layer.lora_bias[name] for name in _active(layer))


class MergedLora:
    """Stand-ins for the layers of a network that have adapters, with merged weights.

    The network's own weights are never written to. Only layers whose merged form computes the same
    are stood in for: those of plain, active, unmerged adapters.

    Args:
        network: Network with or without PEFT layers.
        merge: None merges layers whose base weight is float32 or wider; with lower precision,
            merging would round small updates away. True merges all, False none. Weights that are
            sharded over ranks are never merged: no rank holds one whole.
    """

    def __init__(self, network: nn.Module, merge: bool | None) -> None:
        self._network = network
        self._merge = merge
        # Kept from rollout to rollout, so that compiled code finds the same modules again.
        self._stand_ins: dict[LoraLayer, nn.Module] = {}
        self._filled: list[LoraLayer] = []

    def fill(self) -> Places:
        """Merge the adapters as they are now; return where the results belong."""
        places: Places = {}
        for parent in self._network.modules():
            for name, child in parent.named_children():
                if isinstance(child, LoraLayer) and self._is_wanted(child):
                    places[parent, name] = self._fill(child)
        return places

    def release(self) -> None:
        """Give the memory of the merged weights back."""
        while self._filled:
            layer = self._filled.pop()
            self._stand_ins[layer].weight = layer.get_base_layer().weight

    def _fill(self, layer: LoraLayer) -> nn.Module:
        if layer not in self._stand_ins:
            self._stand_ins[layer] = _without_adapters(layer)
        module = self._stand_ins[layer]
        self._filled.append(layer)
        module.weight = nn.Parameter(merged_weight(layer), requires_grad=False)
        return module

    def _is_wanted(self, layer: LoraLayer) -> bool:
        tuned: Any = layer
        if self._merge is False or tuned.disable_adapters or tuned.merged or not is_plain(layer):
            return False
        weight = cast("Tensor", layer.get_base_layer().weight)
        if isinstance(weight, DTensor):
            return False
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self._merge is True or wide == weight.dtype


def _active(layer: LoraLayer) -> Iterator[str]:
    """Name the active adapters that a layer has and that are not in its weight yet."""
    tuned: Any = layer
    names = (name for name in tuned.active_adapters if name in layer.lora_A)
    return (name for name in names if name not in tuned.merged_adapters)


def _pair(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Return an adapter's (up, down), its scale multiplied into up."""
    up, down = cast("nn.Linear", layer.lora_B[name]), cast("nn.Linear", layer.lora_A[name])
    wide = torch.promote_types(up.weight.dtype, torch.float32)
    return up.weight.detach().to(wide) * layer.scaling[name], down.weight.detach()


def _without_adapters(layer: LoraLayer) -> nn.Module:
    """Copy a base layer; the copy shares the tensors, but can be given others."""
    base = layer.get_base_layer()
    module = copy.copy(base)
    module._parameters = dict(base._parameters)
    return module
