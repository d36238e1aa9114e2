"""Tiny pipelines of diffusers with random weights: one of every kind that the baselines are."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    KandinskyV22CombinedPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from toy_t5 import toy_t5, toy_t5_tokenizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from segalign.text.tokenizer import clip_tokenizer

LEVELS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012}
SCALED = {**LEVELS, "beta_schedule": "scaled_linear"}


def stable_diffusion(**parts: Any) -> StableDiffusionPipeline:
    """Build a Stable Diffusion 1.x with images of 16 pixels."""
    torch.manual_seed(0)
    settings = {"safety_checker": None, "feature_extractor": None, **parts}
    return StableDiffusionPipeline(
        vae=_vae(), unet=_unet(cross_attention_dim=16), text_encoder=CLIPTextModel(_text(16)),
        tokenizer=clip_tokenizer(), scheduler=PNDMScheduler(**SCALED, steps_offset=1,
        skip_prk_steps=True), requires_safety_checker=False, **settings,
    )  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    """Build a model of the shape of SDXL and Playground, with images of 16 pixels."""
    torch.manual_seed(1)
    unet = _unet(
        cross_attention_dim=16 + 12, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(), unet=unet, text_encoder=CLIPTextModel(_text(16)),
        text_encoder_2=CLIPTextModelWithProjection(_text(12)), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"), scheduler=EulerDiscreteScheduler(**SCALED),
    )  # fmt: skip


def pixart() -> PixArtAlphaPipeline:
    """Build a PixArt-alpha with images of 16 pixels."""
    torch.manual_seed(2)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, out_channels=8, cross_attention_dim=24,
    )  # fmt: skip
    # They start at zero, and would show no caption.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return PixArtAlphaPipeline(
        tokenizer=toy_t5_tokenizer(["red", "fox"]), text_encoder=toy_t5(), vae=_vae(),
        transformer=transformer, scheduler=DPMSolverMultistepScheduler(**LEVELS),
    )  # fmt: skip


def kandinsky() -> KandinskyV22CombinedPipeline:
    """Build both stages of Kandinsky 2.2."""
    torch.manual_seed(3)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1
    )
    prior.clip_std.data.fill_(1)  # zero would hide the caption
    vision = CLIPVisionConfig(
        hidden_size=16, image_size=28, projection_dim=16, intermediate_size=16,
        num_attention_heads=2, num_hidden_layers=1, patch_size=14,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, addition_embed_type="image",
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj", cross_attention_dim=16,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, norm_type="spatial",
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), latent_channels=4,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), num_vq_embeddings=12,
        vq_embed_dim=4,
    )  # fmt: skip
    return KandinskyV22CombinedPipeline(
        unet=unet, movq=movq, prior_prior=prior,
        scheduler=DDPMScheduler(**LEVELS, variance_type="learned_range", clip_sample=False),
        prior_image_encoder=CLIPVisionModelWithProjection(vision),
        prior_text_encoder=CLIPTextModelWithProjection(_text(16)),
        prior_tokenizer=clip_tokenizer(), prior_image_processor=CLIPImageProcessor(),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
    )  # fmt: skip


def _text(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=49406, eos_token_id=49407, vocab_size=49408,
    )  # fmt: skip


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn", attention_head_dim=2, **settings,
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
