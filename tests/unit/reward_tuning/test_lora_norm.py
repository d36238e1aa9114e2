"""How far adapters have moved a network: the norm of the products that are never formed."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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
    assert (moved.dtype, moved.requires_grad) == (torch.float64, False)
    assert moved.item() == pytest.approx(explicit_norm(network), rel=1e-12)
    assert lora_norm(network.bfloat16()).dtype == torch.float32


def test_the_scale_of_adapters_counts():
    network = torch.nn.ModuleDict({"layer": nn.Linear(6, 5)})
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["layer"], init_lora_weights=False)
    inject_adapter_in_model(config, network)
    assert lora_norm(network).item() == pytest.approx(explicit_norm(network, 3.0), rel=1e-5)


def test_autocast_changes_nothing():
    """Neither its number type nor the casts it keeps, which are older than an optimizer step."""
    network = with_lora().float()
    layer = next(one for one in network.modules() if isinstance(one, LoraLayer))
    trained = [weight for name, weight in network.named_parameters() if "lora" in name]
    inputs = torch.ones(1, layer.lora_A["default"].in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.lora_B["default"](layer.lora_A["default"](inputs)).sum().backward()
        before = lora_norm(network)
        with torch.no_grad():
            torch._foreach_mul_(trained, 2.0)
        moved = lora_norm(network)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, lora_norm(network))
    assert moved.item() == pytest.approx(4 * before.item(), rel=1e-6)


def test_shards_are_measured_as_whole_weights(mesh):
    network = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(3, 4, 3))
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    inject_adapter_in_model(config, network)
    expected = lora_norm(network)
    fully_shard(network, mesh=mesh)
    assert all(isinstance(weight, DTensor) for weight in network.parameters())
    moved = lora_norm(network)
    assert not isinstance(moved, DTensor)
    torch.testing.assert_close(moved, expected)


def test_fresh_adapters_have_not_moved_it_and_others_have_none():
    assert lora_norm(base()[0]) is None
    network = copy.deepcopy(base()[0])
    LoraSettings(rank=2).add_to(network)
    assert lora_norm(network).item() == 0
