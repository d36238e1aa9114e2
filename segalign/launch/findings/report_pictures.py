"""Pictures of a report: photographs compressed until all fit, small pictures without any loss."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from segalign.evaluation.page_pictures import SMALL_SIDE, data_uri

# What base64 makes of it is a third more.
MAX_BYTES: Final = 3_200_000
# Longest side in pixels and quality of WebP; the first at which all fit is taken. A report shows
# pictures some 230 pixels wide, on screens with up to two dots for each.
_STEPS: Final = (
    (512, 90), (448, 88), (384, 85), (384, 78), (320, 75), (256, 72), (192, 70), (128, 65),
    (96, 60), (64, 50),
)  # fmt: skip


@dataclass(frozen=True)
class ReportPicture:
    """A picture of a page.

    Attributes:
        src: The picture as data.
        width: Its width in the file, in pixels.
        height: Its height.
        is_small: Whether it is enlarged without smoothing.
    """

    src: str
    width: int
    height: int
    is_small: bool


def encode_pictures(paths: Iterable[Path], max_bytes: int = MAX_BYTES) -> dict[Path, ReportPicture]:
    """Turn files into pictures of a page, all large ones at the same scale and quality.

    Args:
        paths: Pictures that can be read.
        max_bytes: Bytes of all together, as files; at the last step they may be more.
    """
    sizes = {path: _size(path) for path in dict.fromkeys(paths)}
    small = {path: _lossless(path) for path, size in sizes.items() if min(size) < SMALL_SIDE}
    large = [path for path in sizes if path not in small]
    left = max_bytes - sum(map(len, small.values()))
    compressed = _compress(large, left)
    return {
        path: ReportPicture(
            data_uri(small[path], "png") if path in small else data_uri(compressed[path], "webp"),
            *size,
            is_small=path in small,
        )
        for path, size in sizes.items()
    }


def _compress(paths: Iterable[Path], max_bytes: int) -> Mapping[Path, bytes]:
    """Compress pictures; those of many runs are not kept in memory beside each other."""
    encoded: dict[Path, bytes] = {}
    for side, quality in _STEPS:
        encoded, size = {}, 0
        is_last = (side, quality) == _STEPS[-1]
        for path in paths:
            encoded[path] = _webp(path, side, quality)
            size += len(encoded[path])
            if size > max_bytes and not is_last:
                break
        else:
            break
    return encoded


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def _lossless(path: Path) -> bytes:
    content = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(content, "PNG", optimize=True)
    return content.getvalue()


def _webp(path: Path, side: int, quality: int) -> bytes:
    content = io.BytesIO()
    with Image.open(path) as picture:
        smaller = picture.convert("RGB")
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        smaller.save(content, "WEBP", quality=quality)
    return content.getvalue()
