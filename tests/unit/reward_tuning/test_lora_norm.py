"""How far adapters have moved a network: the norm of the products that are never formed."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from toy_tuning import base, with_lora

from segalign.diffusion.lora import LoraSettings
from segalign.reward_tuning.lora_norm import lora_norm


def explicit_norm(network, scaling=1.0):
    """Form ``s B A`` of each layer, of convolutions by convolving A's kernels."""
    total = 0.0
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            down, up = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
            equation = "or,ri->oi"
            if down.ndim == 4:
                equation = "orxy,rihw->oihw"
                assert up.shape[2:] == (1, 1)
            total += (scaling * torch.einsum(equation, up, down)).square().sum()
    return total.sqrt().item()


def test_it_is_that_of_the_products_of_linear_layers_and_convolutions():
    network = with_lora()
    kinds = {layer.lora_A["default"].weight.ndim for layer in network.modules()
             if isinstance(layer, LoraLayer)}  # fmt: skip
    assert kinds == {2, 4}
    moved = lora_norm(network)
    assert (moved.dtype, moved.requires_grad) == (torch.float32, False)
    assert moved.item() == pytest.approx(explicit_norm(network), rel=1e-5)


def test_the_scale_of_adapters_counts():
    network = torch.nn.ModuleDict({"layer": nn.Linear(6, 5)})
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights=False)
    inject_adapter_in_model(config, network)
    assert lora_norm(network).item() == pytest.approx(explicit_norm(network, 3.0), rel=1e-5)


def test_fresh_adapters_have_not_moved_it_and_others_have_none():
    assert lora_norm(base()[0]) is None
    network = copy.deepcopy(base()[0])
    LoraSettings(rank=2).add_to(network)
    assert lora_norm(network).item() == 0
