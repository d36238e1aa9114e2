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
from segalign.sharding import data_parallel_mesh, is_sharded, kept_whole, shard_backbone


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
