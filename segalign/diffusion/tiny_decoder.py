"""Tiny decoders of latents (TAESD), in place of a VAE's while a reward is trained on.

They cost a few hundredths of the VAE's decoder, and the gradient is another one: see
`decoder_bias`.

Dims: M images, c/h/w latents, H/W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from segalign.diffusion.model_sizes import draw_weights
from segalign.diffusion.network_files import check_whole, reading
from segalign.errors import ConfigError
from segalign.hub import fetch

_WHAT = "the tiny decoder"


class TinyVAEDecoder(nn.Module):
    """The decoder of a diffusers ``AutoencoderTiny``, frozen.

    It takes what the diffusion network sees, as a ``LatentCodec`` does: TAESD's own factor is 1
    where a VAE of Stable Diffusion has 0.18215, since it was trained on scaled latents.

    Args:
        autoencoder: The autoencoder; its encoder is let go.
    """

    def __init__(self, autoencoder: AutoencoderTiny) -> None:
        super().__init__()
        config = autoencoder.config
        self.network: nn.Module = autoencoder.decoder
        self.num_channels: int = config.latent_channels
        self.scaling_factor: float = config.scaling_factor
        self.shift_factor: float = config.shift_factor
        self.requires_grad_(False)
        self.eval()

    def decode(self, latents: Tensor) -> Tensor:
        """Map scaled latents to images, as ``LatentCodec.decode`` does; differentiable.

        Args:
            latents: ``(M, c, h, w)``.

        Returns:
            Images ``(M, 3, H, W)``, nominally in [0, 1], not clamped, in the latents' precision.

        Raises:
            ConfigError: If the latents have another number of channels.
        """
        if latents.shape[1] != self.num_channels:
            raise ConfigError(
                f"expected latents of {self.num_channels} channels for {_WHAT}; got "
                f"{latents.shape[1]}; use one of the model's family, or the model's own decoder"
            )
        dtype = next(self.network.parameters()).dtype
        own = (latents / self.scaling_factor + self.shift_factor).to(dtype)
        images: Tensor = self.network(own)
        return (images.to(latents.dtype) + 1) / 2


@dataclass(frozen=True, kw_only=True)
class TinyDecoder:
    """A tiny decoder of diffusers, or one of its shape.

    Args:
        model: Hub id or local folder of an ``AutoencoderTiny``: ``madebyollin/taesd`` for Stable
            Diffusion 1.x, ``madebyollin/taesdxl`` for XL. Only safetensors are read.
        init: ``pretrained`` reads ``model``; ``random`` has TAESD's shape, and nothing is read or
            downloaded.
        seed: Seed of random weights.
        dtype: Precision of the weights.
    """

    model: str = "madebyollin/taesd"
    init: Literal["pretrained", "random"] = "pretrained"
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def load(self) -> TinyVAEDecoder:
        """Read or build the decoder.

        Raises:
            ConfigError: If it is not there, or cannot be read.
        """
        if self.init == "random":
            with no_init_weights():
                autoencoder = AutoencoderTiny()
            draw_weights(autoencoder, "tiny decoder", seed=self.seed)
        else:
            autoencoder = _read(fetch(self.model, what=_WHAT))
        return TinyVAEDecoder(autoencoder).to(getattr(torch, self.dtype))


@dataclass(frozen=True, eq=False)
class DecoderBias:
    """How far a reward's gradient through a tiny decoder is from that through the full one.

    Attributes:
        cosine: Of the two gradients in the latents, by image, ``(M,)``; NaN where one is zero.
        norm_ratio: Length of the tiny decoder's over that of the full one's, ``(M,)``.
    """

    cosine: Tensor
    norm_ratio: Tensor


def decoder_bias(
    loss_full: Callable[[Tensor, Tensor], Tensor],
    loss_tiny: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    rows: Tensor,
) -> DecoderBias:
    """Compare the gradients of a loss through two decoders.

    Args:
        loss_full: Maps latents and rows to losses ``(M,)``, through the full decoder.
        loss_tiny: The same through the tiny one.
        latents: Clean latents ``(M, c, h, w)``.
        rows: Which caption each has, int64 ``(M,)``.

    Returns:
        The bias, without gradient.
    """
    full, tiny = (_gradient(loss, latents, rows) for loss in (loss_full, loss_tiny))
    lengths, tiny_lengths = full.norm(dim=1), tiny.norm(dim=1)
    cosine = (full / lengths[:, None] * tiny / tiny_lengths[:, None]).sum(dim=1)
    return DecoderBias(cosine, tiny_lengths / lengths)


def _gradient(loss: Callable[[Tensor, Tensor], Tensor], latents: Tensor, rows: Tensor) -> Tensor:
    """Differentiate the sum of losses in the latents, ``(M, c h w)``."""
    with torch.enable_grad():
        leaf = latents.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, rows).sum(), leaf)
    flat = gradient.flatten(1)
    return flat if flat.dtype == torch.float64 else flat.float()


def _read(folder: Path) -> AutoencoderTiny:
    """Read an autoencoder in float32."""
    with reading(_WHAT, folder):
        loaded, info = _load(folder)
    check_whole(info, _WHAT, folder)
    return loaded


def _load(folder: Path) -> tuple[AutoencoderTiny, dict[str, Any]]:
    """Load an autoencoder, and what its file lacks, which the library would draw."""
    kind = AutoencoderTiny.load_config(folder).get("_class_name", "AutoencoderTiny")
    if kind != "AutoencoderTiny":
        raise TypeError(f"the config of an `{kind}`")
    settings: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    loaded, info = AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32, **settings)
    return loaded, info
