"""Pictures inside a page: as data, and not larger than a page can bear.

Dims: H/W pixels.
"""

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from PIL import Image

if TYPE_CHECKING:  # a page of files needs none
    from torch import Tensor

# What base64 makes of it is a third more.
MAX_BYTES: Final = 3_200_000
# Pictures with a side below are enlarged without smoothing.
SMALL_SIDE: Final = 128
_SCALES: Final = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)


def data_uri(content: bytes, kind: str = "png") -> str:
    """Write a picture as a URI that holds it.

    Args:
        content: The picture's file.
        kind: Its format, as in ``image/png``.
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def to_lossless(image: "Tensor") -> bytes:
    """Encode an image as PNG.

    Args:
        image: uint8 ``(3, H, W)``.
    """
    return _png(_picture(image), 1.0)


def encode_images(images: "Mapping[int, Tensor]", max_bytes: int = MAX_BYTES) -> dict[int, bytes]:
    """Encode images as PNG, all at the largest scale at which they fit.

    Args:
        images: uint8 ``(3, H, W)`` by place.
        max_bytes: Bytes of all together; at 1/16 of their sides they may be more.
    """
    pictures = {place: _picture(image) for place, image in images.items()}
    encoded = {place: _png(picture, 1.0) for place, picture in pictures.items()}
    whole = _size(encoded)
    for scale in _SCALES:
        if _size(encoded) <= max_bytes:
            break
        # What would be too large by far is not tried.
        if whole * scale**2 <= max_bytes:
            encoded = {place: _png(picture, scale) for place, picture in pictures.items()}
    return encoded


def _size(encoded: Mapping[int, bytes]) -> int:
    return sum(map(len, encoded.values()))


def _picture(image: "Tensor") -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _png(picture: Image.Image, scale: float) -> bytes:
    if scale != 1:
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
