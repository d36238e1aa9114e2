"""What a text-to-image model is made of, and where it comes from."""

from dataclasses import dataclass
from typing import Protocol

from diffusers import UNet2DConditionModel

from segalign.diffusion.latents import LatentCodec
from segalign.diffusion.schedule import NoiseSchedule
from segalign.text.text_models import TextModels


@dataclass(frozen=True)
class DiffusionBundle:
    """The parts of one text-to-image model.

    Attributes:
        unet: Denoising network with cross-attention (diffusers' ``UNet2DConditionModel``).
        text_models: Its text models.
        codec: Latent codec.
        schedule: Noise levels and parameterisation.
        image_size: Native side of an image in pixels.
    """

    unet: UNet2DConditionModel
    text_models: TextModels
    codec: LatentCodec
    schedule: NoiseSchedule
    image_size: int


class BundleSource(Protocol):
    """Names a model in a config; nothing is read before `load`."""

    def load(self) -> DiffusionBundle:
        """Read or build the model, on the CPU.

        Raises:
            ConfigError: If it is not there.
        """
