"""Images of a report as 8-bit PNGs: what is scored later is what was stored.

Dims: B images, H/W pixels.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segalign.atomic import write_bytes_atomic
from segalign.pictures import to_uint8


def as_stored(images: Tensor) -> Tensor:
    """Clamp and round images as a file of them would; pixels that are not finite become NaN.

    Args:
        images: In [0, 1], ``(B, 3, H, W)``.

    Returns:
        Float32 in [0, 1], multiples of 1 / 255, on the same device.
    """
    rounded = torch.from_numpy(to_uint8(images.nan_to_num())).movedim(-1, -3).float() / 255
    finite = images.isfinite().all(dim=1, keepdim=True)
    return rounded.to(images.device).masked_fill(~finite, torch.nan)


def write_image(path: Path, image: Tensor) -> None:
    """Write a PNG, whole or not at all; pixels that are not finite are transparent.

    Args:
        path: Where to; its directory is there.
        image: In [0, 1], ``(3, H, W)``.
    """
    pixels = to_uint8(image.nan_to_num())
    finite = image.isfinite().all(dim=0)
    if not finite.all():
        opacity = finite.cpu().numpy().astype(np.uint8)[..., None] * 255
        pixels = np.concatenate([pixels, opacity], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_bytes_atomic(path, buffer.getvalue())


def read_image(path: Path) -> Tensor:
    """Read what `write_image` wrote, float32 ``(3, H, W)``; transparent pixels are NaN."""
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.asarray(file.convert("RGBA")).copy()).movedim(-1, 0)
    return (pixels[:3].float() / 255).masked_fill(pixels[3] == 0, torch.nan)
