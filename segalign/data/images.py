"""Decode untrusted image bytes to RGB: capped size, one orientation, one colour space."""

import io
import re
import struct
import warnings
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from segalign.data.faults import SampleFault

MAX_PIXELS: Final = 64 * 1000 * 1000
IMAGE_SUFFIXES: Final = ("jpg", "jpeg", "png", "webp")
_ADDRESS: Final = re.compile(r" <[^<>]* object at 0x[0-9a-f]+>")
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF")
_DECODER_ERRORS: Final = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def sniff_suffix(raw: bytes) -> str:
    """Return ``png``, ``webp`` or, for all else, ``jpg``, by the first bytes of a file."""
    if raw.startswith(b"\x89PNG"):
        return "png"
    return "webp" if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP" else "jpg"


def open_image(raw: bytes) -> Image.Image:
    """Read an image's header only; pixels are not decoded.

    Raises:
        SampleFault: If the bytes are no JPEG, PNG, WebP or GIF, or the image has more than
            ``MAX_PIXELS`` pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(raw), formats=_FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as err:
            raise SampleFault("image_too_large", f"more than {MAX_PIXELS} pixels") from err
        except _DECODER_ERRORS as err:
            raise SampleFault("image_unreadable", _first_line(err)) from err
    if image.width * image.height > MAX_PIXELS:
        raise SampleFault(
            "image_too_large", f"{image.width}x{image.height}, at most {MAX_PIXELS} pixels"
        )
    return image


def decode_image(raw: bytes, image_size: int | None = None) -> NDArray[np.uint8]:
    """Decode to RGB: first frame, EXIF orientation applied, transparency over white.

    Args:
        raw: A JPEG, PNG, WebP or GIF file.
        image_size: Side of the square result, in pixels: the short side is resized to it (JPEG
            files are already decoded at a reduced scale), the centre is kept. None keeps the
            size.

    Returns:
        Array ``(H, W, 3)``, sRGB values in [0, 255]; 16-bit values are scaled, not cut.

    Raises:
        SampleFault: If the image cannot be decoded or is too large.
    """
    image = open_image(raw)
    try:
        if image_size is not None:
            image.draft("RGB" if image.mode != "CMYK" else "CMYK", (image_size, image_size))
        image.seek(0)
        ImageOps.exif_transpose(image, in_place=True)  # else it copies what needs no turning
        rgb = _to_rgb(image)
        if image_size is not None and rgb.size != (image_size, image_size):
            rgb = _resize_and_crop(rgb, image_size)
        return np.asarray(rgb)
    except _DECODER_ERRORS as err:
        raise SampleFault("image_unreadable", _first_line(err)) from err


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    """Resize the short side and keep the centre; what is cut away is never computed.

    So a strip of one pixel by thousands, which would be huge at this scale, costs no more either.
    """
    scale = side / min(image.size)
    sizes = [max(side, round(length * scale)) for length in image.size]
    starts = [(size - side) // 2 for size in sizes]
    if sizes == list(image.size):
        return image.crop((starts[0], starts[1], starts[0] + side, starts[1] + side))
    steps = [old / new for old, new in zip(image.size, sizes, strict=True)]
    left, top = (start * step for start, step in zip(starts, steps, strict=True))
    right, bottom = (
        min((start + side) * step, length)  # not past the border by an error of rounding
        for start, step, length in zip(starts, steps, image.size, strict=True)
    )
    return image.resize(
        (side, side), Image.Resampling.BICUBIC, box=(left, top, right, bottom), reducing_gap=3.0
    )


def _first_line(err: BaseException) -> str:
    # Reports of equal data are equal, so they hold no address of an object.
    line = _ADDRESS.sub("", f"{type(err).__name__}: {err}".splitlines()[0])
    return line[:200]
