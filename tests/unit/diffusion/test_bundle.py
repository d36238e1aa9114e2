"""A local diffusers folder: read as float32, refused with one line, trained with LoRA."""

import functools

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lightning_modules.long_text_diffusion import LongTextDiffusionModule
from segalign.diffusion.bundle import DiffusersFolder
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import ConfigError
from segalign.text.settings import TextEncoding
from segalign.text.tokenizer import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a tiny Stable Diffusion in half precision, as many published copies are."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sd")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=49406,
            eos_token_id=49407,
            vocab_size=49408,
        )
    )
    unet.half().save_pretrained(path / "unet")
    vae.half().save_pretrained(path / "vae")
    text.half().save_pretrained(path / "text_encoder")
    clip_tokenizer().save_pretrained(path / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(path / "scheduler")
    return path


def test_everything_is_float32(folder):
    bundle = DiffusersFolder(path=str(folder)).load()
    assert bundle.image_size == 16
    assert bundle.schedule.prediction_type == "epsilon"
    parts = (bundle.unet, bundle.codec.vae, bundle.text_model)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_a_missing_part_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"with `unet/` at .*; found none\. Download the model"):
        DiffusersFolder(path=str(tmp_path)).load()


def test_lora_trains_and_generates_from_it(folder):
    module = LongTextDiffusionModule(
        base=DiffusersFolder(path=str(folder)),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        text=TextEncoding(token_budget=64),
        lora=LoraSettings(rank=2),
        sampler=DDIMSampler(num_inference_steps=2, guidance_scale=3.0),
    )
    module.configure_model()
    captions = ["A red fox. It sits on a wall!", ""]
    text = module.generator.conditioner(captions)
    latents = module.codec.encode(torch.rand(2, 3, 16, 16))
    losses = module._losses(latents, text, [(0, 0, 0, 0), (0, 0, 0, 1)])
    losses.sum().backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    touched = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    # The second factor starts at zero, so the first one has no gradient yet.
    assert touched == {name for name in trained if "lora_B" in name}
    images = module.generate(captions, [0, 1], eval_seed=1)
    assert images.shape == (2, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    alone = module.generate(captions[1:], [1], eval_seed=1)
    assert torch.allclose(images[1:], alone, atol=1e-4)
