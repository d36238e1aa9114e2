"""A UNet small enough to build in every test, with layers of all the kinds that LoRA adapts."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from segalign.diffusion.lora import LoraSettings
from segalign.formats.official_lora import official_targets

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


class Payload:
    """Pickles as a call that makes a folder, as a hostile file would call a shell."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def payload(tmp_path):
    return Payload(tmp_path / "ran")


@pytest.fixture
def make_unet():
    def make(**changes) -> UNet2DConditionModel:
        torch.manual_seed(0)
        return UNet2DConditionModel(**{**TINY, **changes}).eval().requires_grad_(False)

    return make


@pytest.fixture
def unet(make_unet):
    return make_unet()


@pytest.fixture
def peft_unet(unet):
    """The UNet with an adapter of rank 3 that changes its output."""
    LoraSettings(rank=3).add_to(unet)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return unet


@pytest.fixture
def make_pairs():
    def make(unet, rank=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            target.path: tuple(
                torch.randn(shape, generator=generator) * 0.1 for shape in target.pair_shapes(rank)
            )
            for target in official_targets(unet)
        }

    return make


@pytest.fixture
def run_unet():
    def run(unet) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        embeds = torch.randn(2, 5, TINY["cross_attention_dim"], generator=generator)
        with torch.no_grad():
            return unet(latents, torch.tensor([10, 900]), encoder_hidden_states=embeds).sample

    return run
