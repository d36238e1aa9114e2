"""What images a model may return, and how they are rounded.

Dims: B images of a micro-batch, H/W pixels.
"""

from typing import Final

import torch
from torch import Tensor

from segalign.errors import DataError
from segalign.pictures import to_bytes

# What clamped images may exceed [0, 1] by: nothing but rounding.
_SLACK: Final = 1e-3


def check_images(images: Tensor) -> Tensor:
    """Return images as they are.

    Raises:
        DataError: If they are not floats ``(B, 3, H, W)``.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise DataError(
            f"expected float images (B, 3, H, W) from the model; got {images.dtype} of shape "
            f"{tuple(images.shape)}; mend its `generate`"
        )
    return images


def outside_range(images: Tensor) -> dict[int, DataError]:
    """Find images that leave [0, 1], by row; those that are not finite are left out.

    Args:
        images: Float ``(B, 3, H, W)``.
    """
    flat = images.flatten(1).float()
    lows, highs = (bound.tolist() for bound in torch.aminmax(flat, dim=1))
    finite = flat.isfinite().all(dim=1).tolist()
    return {
        row: DataError(
            f"expected images in [0, 1] from the model; got {low:.3g} to {high:.3g}; scale and "
            "clamp what its `generate` returns"
        )
        for row, (low, high) in enumerate(zip(lows, highs, strict=True))
        if finite[row] and (low < -_SLACK or high > 1 + _SLACK)
    }


def to_pixels(images: Tensor) -> Tensor:
    """Round images in [0, 1] as files do: uint8 ``(B, 3, H, W)``, on the same device.

    Raises:
        DataError: If they are not ``(B, 3, H, W)``, or leave [0, 1].
    """
    for error in outside_range(check_images(images)).values():
        raise error
    return to_bytes(images)
