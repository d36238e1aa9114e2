"""Latent codecs: between images in [0, 1] and what the diffusion network sees.

Dims: B batch, H/W pixels, c/h/w latents.
"""

from typing import Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F


class LatentCodec(Protocol):
    """Encodes images to latents and back."""

    def encode(self, images: Tensor) -> Tensor:
        """Map images in [0, 1], ``(B, 3, H, W)``, to latents ``(B, c, h, w)``."""

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents to images ``(B, 3, H, W)``, nominally in [0, 1], not clamped."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) for an image size."""


class PixelUnshuffleCodec(nn.Module):
    """Exact codec of small images: blocks of pixels become channels, in [-1, 1].

    Args:
        factor: Side of a block in pixels.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        """Map ``(B, 3, H, W)`` in [0, 1] to ``(B, 3 f^2, H/f, W/f)`` in [-1, 1]."""
        return F.pixel_unshuffle(images * 2 - 1, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Invert `encode`."""
        return (F.pixel_shuffle(latents, self.factor) + 1) / 2

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) for an image size in pixels."""
        return 3 * self.factor**2, height // self.factor, width // self.factor


class VAECodec(nn.Module):
    """Latents of a diffusers ``AutoencoderKL``: its posterior mean, scaled.

    The mean instead of a sample makes latents cacheable; SD's posterior is narrow (its standard
    deviation is a few thousandths of the latents').

    Args:
        vae: The autoencoder, frozen by the caller.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, images: Tensor) -> Tensor:
        """Map images in [0, 1] to scaled latents; no gradient."""
        with torch.no_grad():
            posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        latents: Tensor = posterior.mode() * self.vae.config.scaling_factor
        return latents.to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Map scaled latents to images; differentiable."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images: Tensor = self.vae.decode(scaled).sample
        return (images.to(latents.dtype) + 1) / 2

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (c, h, w) for an image size in pixels."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, height // factor, width // factor
