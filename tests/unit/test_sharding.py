"""What is sharded of a network, on a mesh of one rank."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toy_tuning import TinyBase

from segalign.diffusion.lora import LoraSettings
from segalign.errors import ConfigError
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.rewards.trained_parts import TrainedParts
from segalign.sharding import (
    data_parallel_mesh,
    is_sharded,
    kept_whole,
    shard_backbone,
    shard_trained_layers,
)


def groups(network):
    """Name the modules that are gathered by themselves."""
    return {name for name, part in network.named_modules() if isinstance(part, FSDPModule)}


def unet(dtype=torch.float32, lora=None):
    network = TinyBase(dtype).load().unet
    if lora is not None:
        lora.add_to(network)
    return network


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_blocks_and_the_network_are_groups_that_hold_all_weights(mesh, lora):
    network = unet(lora=lora)
    shard_backbone(network, mesh)
    assert all(isinstance(weight, DTensor) for weight in network.parameters())
    assert {
        "",
        "up_blocks.0",
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "up_blocks.0.resnets.1",
    } < groups(network)
    assert not any("lora" in name for name in groups(network))


def test_layers_of_the_towers_that_are_trained_are_sharded_alone(mesh):
    model = PretrainedScorer(model="tiny", init="random").load().model
    TrainedParts(image_blocks=1, text_blocks=0).apply(model)
    shard_trained_layers(model, mesh)
    sharded = {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    tower = "vision_model.encoder.layers."
    assert sharded == {name for name, _ in model.named_parameters() if name.startswith(tower)}
    assert len(groups(model)) > 1
    model = PretrainedScorer(model="tiny", init="random").load().model
    TrainedParts(image_blocks=0, text_blocks=0).apply(model)
    assert shard_trained_layers(model, mesh) == []
    assert not is_sharded(model)


def test_adapters_of_another_precision_are_gathered_by_themselves(mesh):
    network = unet(torch.bfloat16, LoraSettings(rank=2))
    shard_backbone(network, mesh)
    factors = {name for name in groups(network) if "lora" in name}
    weights = [name for name, _ in network.named_parameters() if "lora" in name]
    assert factors == {name.removesuffix(".weight") for name in weights}


def test_weights_are_whole_between_calls_only_where_they_are_kept_so(mesh):
    network = unet()
    shard_backbone(network, mesh)
    inputs = torch.zeros(1, 4, 4, 4), torch.tensor([3]), torch.zeros(1, 5, 32)

    def all_sharded():
        return all(isinstance(weight, DTensor) for weight in network.parameters())

    with torch.no_grad():
        network(*inputs)
        assert all_sharded()
        with kept_whole(network):
            network(*inputs)
            assert not any(isinstance(weight, DTensor) for weight in network.parameters())
        assert all_sharded()
        network(*inputs)
    assert all_sharded()
    assert is_sharded(network)


def test_a_call_with_gradient_may_be_made_whole_and_gone_back_over_in_shards(mesh):
    network, inputs = unet(), (torch.zeros(1, 4, 4, 4), torch.tensor([3]), torch.ones(1, 5, 32))
    network(*inputs).sample.square().sum().backward()
    expected = {name: weight.grad for name, weight in network.named_parameters()}
    network = unet()
    shard_backbone(network, mesh)
    with kept_whole(network):
        loss = network(*inputs).sample.square().sum()
    loss.backward()
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.grad.full_tensor(), expected[name])


def test_tensor_parallelism_is_refused():
    distributed.init_process_group("fake", rank=0, world_size=4)
    try:
        names = ("data_parallel", "tensor_parallel")
        alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=names)
        assert data_parallel_mesh(alone).size() == 4
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        with pytest.raises(ConfigError, match="expected ranks that all share the data; got a mesh"):
            data_parallel_mesh(both)
    finally:
        distributed.destroy_process_group()
