"""Image generation from captions: one interface for grids, oracles, metrics and commands.

Dims: B batch, L text tokens, D text width, H/W pixels, c/h/w latents.
"""

import copy
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from segalign.diffusion.following_noise import following_noise
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.latents import LatentCodec
from segalign.diffusion.linear_steps import Denoiser
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import Sampler
from segalign.errors import ConfigError
from segalign.rng import counter_normal
from segalign.text.conditioning import TextConditioner, TextConditioning

Weights = Literal["raw", "ema"]


@runtime_checkable
class ImageGenerator(Protocol):
    """Whatever makes images from captions."""

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make one image for each caption.

        Args:
            captions: ``B`` captions.
            sample_ids: ``B`` integers; with ``eval_seed`` they alone decide an image's noise.
            eval_seed: Seed of the evaluation: one for all images, or ``B`` of them.
            weights: The trained weights, or their moving average.

        Returns:
            Float images in [0, 1], ``(B, 3, H, W)``. No gradient, and no effect on training.
        """
        ...


def as_generator(module: object) -> ImageGenerator:
    """Take a module as an image generator.

    Raises:
        ConfigError: If it cannot make images.
    """
    if not isinstance(module, ImageGenerator):
        raise ConfigError(
            f"expected a model that generates images; got `{type(module).__name__}`. "
            "Remove the callback that needs one."
        )
    return module


class TextToImage:
    """Generation with a denoising network, a text conditioner and a codec.

    Args:
        unet: Denoising network with cross-attention.
        conditioner: Text encoder.
        codec: Latent codec.
        schedule: Noise levels and parameterisation.
        image_size: Side of an image in pixels.
        mask_padding: Hide the padding of the text from the network.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: TextConditioner,
        codec: LatentCodec,
        schedule: NoiseSchedule,
        *,
        image_size: int,
        mask_padding: bool,
    ) -> None:
        self.unet = unet
        self.conditioner = conditioner
        self.codec = codec
        self.schedule = schedule
        self.image_size = image_size
        self.mask_padding = mask_padding

    def with_text(self, conditioner: TextConditioner, *, mask_padding: bool) -> "TextToImage":
        """Return the same generator with another text encoder."""
        return TextToImage(
            self.unet,
            conditioner,
            self.codec,
            self.schedule,
            image_size=self.image_size,
            mask_padding=mask_padding,
        )

    def frozen_copy(self) -> "TextToImage":
        """Copy the network as it is now, frozen; all else is shared."""
        generator = copy.copy(self)
        generator.unet = copy.deepcopy(self.unet).requires_grad_(False)
        return generator

    def predict(self, latents: Tensor, timesteps: Tensor, text: TextConditioning) -> Tensor:
        """Call the network.

        Args:
            latents: Noisy latents ``(B, c, h, w)``.
            timesteps: int64 ``(B,)`` or scalar.
            text: Conditioning of the ``B`` captions.

        Returns:
            The output, computed in the network's precision, in that of the latents.
        """
        if self.mask_padding:
            # Masked positions change nothing, so those that are masked in all rows can go.
            text = text.without_masked_tail()
        dtype = self.unet.dtype
        output: Tensor = self.unet(
            latents.to(dtype),
            timesteps,
            encoder_hidden_states=text.prompt_embeds.to(dtype),
            encoder_attention_mask=text.attention_mask if self.mask_padding else None,
            added_cond_kwargs=self._added_conditions(text),
        ).sample
        return output.to(latents.dtype)

    def _added_conditions(self, text: TextConditioning) -> dict[str, Tensor] | None:
        """Give SDXL's network its pooled text and image sizes: native size, uncropped."""
        if getattr(self.unet.config, "addition_embed_type", None) != "text_time":
            return None
        if text.pooled is None:
            raise ConfigError(
                "expected pooled text features for this network (SDXL); the text encoding has "
                "none; use a `text.context` with `clip`"
            )
        side = float(self.image_size)
        pooled = text.pooled.to(self.unet.dtype)
        sizes = pooled.new_tensor([[side, side, 0.0, 0.0, side, side]])
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}

    def sample(self, captions: Sequence[str], noise: Tensor, sampler: Sampler) -> Tensor:
        """Turn noise into images under classifier-free guidance; no gradient.

        Args:
            captions: ``B`` captions.
            noise: Standard normal latents ``(B, c, h, w)``. Noise of later steps, where a sampler
                injects some, follows from it.
            sampler: Steps and guidance.

        Returns:
            Images in [0, 1], clamped, ``(B, 3, H, W)``; NaN where the model overflows.
        """
        with torch.no_grad():
            denoise = self._guided(captions, sampler.guidance)
            step_noise = following_noise(noise)
            latents = sampler.sample(denoise, noise, self.schedule, step_noise=step_noise)
            images = self.codec.decode(latents).float()
            # An overflow must not pass for black or white.
            return images.clamp(0, 1).masked_fill(~images.isfinite(), torch.nan)

    def _guided(self, captions: Sequence[str], guidance: Guidance) -> Denoiser:
        """Bind the network to captions; without guidance there is no negative prompt."""
        positive = self._bound(self.conditioner(captions))
        if guidance.scale == 1:
            return positive
        negative = self._bound(self.conditioner.encode_empty(len(captions)))
        return guidance.denoiser(positive, negative, self.schedule.num_timesteps)

    def _bound(self, text: TextConditioning) -> Denoiser:
        def denoise(latents: Tensor, timestep: int) -> Tensor:
            return self.predict(latents, torch.tensor(timestep, device=latents.device), text)

        return denoise

    def noise(self, sample_ids: Sequence[int], eval_seed: int | Sequence[int]) -> Tensor:
        """Draw starting latents that depend on the seed and each sample's id alone."""
        seeds = [eval_seed] * len(sample_ids) if isinstance(eval_seed, int) else eval_seed
        counters = list(zip(seeds, sample_ids, strict=True))
        shape = self.codec.latent_shape(self.image_size, self.image_size)
        return counter_normal("generate", counters, shape)
