"""Resizing images for feature networks; FID depends on it more than on most models.

Dims: B images, H/W pixels, S side of the result.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x,
)


def tensorflow_bilinear(pixels: Tensor, side: int) -> Tensor:
    """Resize as TensorFlow 1 did: bilinear, no antialiasing, corners where they are not.

    Args:
        pixels: uint8 ``(B, 3, H, W)``.
        side: S.

    Returns:
        float32 ``(B, 3, S, S)`` in [0, 255].
    """
    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(
        pixels.float(), size=(side, side), align_corners=False
    )
    return resized


def pil_bicubic(pixels: Tensor, side: int) -> Tensor:
    """Resize with PIL, bicubic with antialiasing, each colour in float32 and never rounded.

    Args:
        pixels: uint8 ``(B, 3, H, W)``.
        side: S.

    Returns:
        float32 ``(B, 3, S, S)`` in [0, 255], cut off there, on the device of the pixels.

    Reference: arXiv 2104.11222 (clean-fid).
    """
    planes = pixels.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = [
        np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    stacked = torch.from_numpy(np.stack(resized)).clamp(0, 255)
    return stacked.view(*pixels.shape[:2], side, side).to(pixels.device)


def smooth_bicubic(pixels: Tensor, side: int) -> Tensor:
    """Resize bicubic with antialiasing; overshoots are kept.

    Args:
        pixels: uint8 ``(B, 3, H, W)``.
        side: S.

    Returns:
        float32 ``(B, 3, S, S)``, nominally in [0, 1].
    """
    return F.interpolate(pixels.float() / 255, (side, side), mode="bicubic", antialias=True)
