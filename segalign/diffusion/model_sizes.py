"""The shapes of known text-to-image models, built with random weights and nothing downloaded.

So size, memory and speed of the real thing can be measured anywhere.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from segalign.rng import counter_seed
from segalign.text.text_models import TextModels
from segalign.text.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE, clip_tokenizer

Size = Literal["sd15", "sdxl", "tiny"]


@dataclass(frozen=True)
class ModelShape:
    """Configs of the networks of one model; what they leave out is the library's default.

    Attributes:
        unet: Of diffusers' ``UNet2DConditionModel``. Its ``attention_head_dim`` counts heads.
        vae: Of diffusers' ``AutoencoderKL``.
        text: Of the ``CLIPTextModel``.
        text_2: Of the projecting second tower, or None.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    text_2: Mapping[str, Any] | None = None


SCHEDULER_CONFIG: Final[Mapping[str, Any]] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
"""The noise levels that SD-1.5 and SDXL share."""

_FOUR_LEVELS: Final = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_SD_VAE: Final = {
    **_FOUR_LEVELS,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_CLIP_L: Final = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_SHAPES: Final[Mapping[Size, ModelShape]] = {
    # Of SD-1.5's UNet the library's defaults are all but these.
    "sd15": ModelShape(
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae=_SD_VAE,
        text=_CLIP_L,
    ),
    "sdxl": ModelShape(
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_SD_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        text=_CLIP_L,
        text_2={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
    ),
    "tiny": ModelShape(
        unet={
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
        vae={
            **_FOUR_LEVELS,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 64,
            "scaling_factor": 0.18215,
        },
        text={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 32,
        },
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelParts:
    """The networks of one text-to-image model and the config of its noise levels.

    Attributes:
        unet: Denoising network.
        vae: Autoencoder.
        text_models: Text towers and tokenizers.
        scheduler_config: As in diffusers' ``scheduler_config.json``.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_models: TextModels
    scheduler_config: Mapping[str, Any]


def random_parts(size: Size, *, seed: int, device: torch.device) -> ModelParts:
    """Build a model of a known size in float32.

    Args:
        size: Which one.
        seed: Decides every weight, together with the weight's name.
        device: Where to; on ``meta`` there are shapes alone, at no cost.

    Returns:
        Parts in evaluation mode. Weights are uniform with variance 1/(3 fan-in), as PyTorch's
        linear layers and convolutions start; norms are 1 and biases 0.
    """
    shape = _SHAPES[size]
    with no_init_weights(), torch.device(device):
        unet = UNet2DConditionModel(**shape.unet)
        vae = AutoencoderKL(**shape.vae)
        text = CLIPTextModel(_text_config(shape.text))
        text_2 = None
        if shape.text_2 is not None:
            text_2 = CLIPTextModelWithProjection(_text_config(shape.text_2))
    for name, part in {"unet": unet, "vae": vae, "text": text, "text_2": text_2}.items():
        if part is not None:
            draw_weights(part, name, seed=seed)
            part.eval()
    return ModelParts(
        unet=unet,
        vae=vae,
        text_models=TextModels(
            text_model=text,
            tokenizer=clip_tokenizer(),
            text_model_2=text_2,
            tokenizer_2=None if text_2 is None else clip_tokenizer(pad_token="!"),  # noqa: S106
        ),
        scheduler_config=SCHEDULER_CONFIG,
    )


@torch.no_grad()
def draw_weights(module: nn.Module, name: str, *, seed: int) -> None:
    """Fill a module's parameters; each depends on the seed and its own name alone.

    Args:
        module: Any module whose vectors are norms' weights and biases; on ``meta`` it is left.
        name: The module's name, part of each parameter's.
        seed: Seed.
    """
    for path, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() < 2:
            parameter.fill_(float(path.endswith("weight")))
            continue
        # Drawn on the CPU in float32, so that the weights depend neither on the device nor on the
        # default precision; NumPy is the quickest.
        is_drawn_in = parameter.is_cpu and parameter.dtype == torch.float32
        drawn = parameter if is_drawn_in else torch.empty(parameter.shape, dtype=torch.float32)
        generator = np.random.default_rng(counter_seed(f"weights {name}.{path}", seed))
        generator.random(out=drawn.numpy(), dtype=np.float32)
        bound = 1 / math.sqrt(parameter[0].numel())
        parameter.copy_(drawn.mul_(2 * bound).sub_(bound))


def _text_config(config: Mapping[str, Any]) -> CLIPTextConfig:
    return CLIPTextConfig(
        **config,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=VOCAB_SIZE - 2,
        eos_token_id=VOCAB_SIZE - 1,
        pad_token_id=VOCAB_SIZE - 1,
    )
