"""What a text-to-image model is made of, and where it comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from segalign.diffusion.latents import LatentCodec, VAECodec
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError


@dataclass(frozen=True)
class DiffusionBundle:
    """The parts of one text-to-image model.

    Attributes:
        unet: Denoising network with cross-attention (diffusers' ``UNet2DConditionModel``).
        text_model: CLIP text transformer.
        tokenizer: Its tokenizer.
        codec: Latent codec.
        schedule: Noise levels and parameterisation.
        image_size: Native side of an image in pixels.
    """

    unet: UNet2DConditionModel
    text_model: CLIPTextModel
    tokenizer: CLIPTokenizer
    codec: LatentCodec
    schedule: NoiseSchedule
    image_size: int


class BundleSource(Protocol):
    """Names a model in a config; nothing is read before `load`."""

    def load(self) -> DiffusionBundle:
        """Read or build the model, in float32, on the CPU.

        Raises:
            ConfigError: If it is not there.
        """


@dataclass(frozen=True, kw_only=True)
class DiffusersFolder:
    """A local folder in diffusers layout (``unet/ vae/ text_encoder/ tokenizer/ scheduler/``).

    Args:
        path: The folder.
    """

    path: str

    def load(self) -> DiffusionBundle:
        """Read the five parts; tensors come from safetensors files only."""
        folder = Path(self.path)
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if not (folder / part).is_dir():
                raise ConfigError(
                    f"expected a diffusers folder with `{part}/` at `{folder}`; found none. "
                    "Download the model and set `path` to its folder."
                )
        safe = {"torch_dtype": torch.float32, "use_safetensors": True}
        vae = AutoencoderKL.from_pretrained(folder / "vae", **safe)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", **safe)
        codec = VAECodec(vae)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        return DiffusionBundle(
            unet=unet,
            text_model=CLIPTextModel.from_pretrained(
                folder / "text_encoder", dtype=torch.float32, use_safetensors=True
            ),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            codec=codec,
            schedule=NoiseSchedule.from_config(DDPMScheduler.load_config(folder / "scheduler")),
            image_size=unet.config.sample_size * scale,
        )
