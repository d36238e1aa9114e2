"""Pictures for people: grids of images with their captions underneath.

Dims: B batch, H/W pixels.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 8
_FONT_SIZE = 11
_LINE_HEIGHT = 14


@dataclass(frozen=True)
class Panel:
    """One cell of a grid.

    Attributes:
        images: One or more images side by side, each float ``(3, H, W)`` in [0, 1].
        titles: A word above each image.
        caption: The text underneath.
    """

    images: Sequence[Tensor]
    titles: Sequence[str]
    caption: str


def to_bytes(images: Tensor) -> Tensor:
    """Clamp and round images in [0, 1] to uint8 of the same shape, on the same device."""
    return images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Clamp and round images in [0, 1], ``(..., 3, H, W)``, to uint8 ``(..., H, W, 3)``."""
    array: NDArray[np.uint8] = to_bytes(images.cpu()).movedim(-3, -1).numpy()
    return array


def panel_grid(
    panels: Sequence[Panel], *, columns: int, side: int = 160, max_lines: int = 12
) -> Image.Image:
    """Draw panels as a grid.

    Args:
        panels: At least one; all hold the same number of images.
        columns: Panels in a row.
        side: Side of a drawn image in pixels; small images are enlarged without smoothing.
        max_lines: Lines of a caption that are shown; a longer one ends in an ellipsis.
    """
    count = max(len(panel.images) for panel in panels)
    width = count * side + (count - 1) * _MARGIN
    lines = [_wrap(panel.caption, width, max_lines) for panel in panels]
    text_height = max(map(len, lines)) * _LINE_HEIGHT
    height = _LINE_HEIGHT + side + text_height + _MARGIN
    rows = -(-len(panels) // columns)
    sheet = Image.new(
        "RGB",
        (columns * (width + 2 * _MARGIN) + _MARGIN, rows * (height + 2 * _MARGIN) + _MARGIN),
        "white",
    )
    for index, panel in enumerate(panels):
        left = _MARGIN + (index % columns) * (width + 2 * _MARGIN)
        top = _MARGIN + (index // columns) * (height + 2 * _MARGIN)
        _draw_panel(sheet, panel, lines[index], left, top, side)
    return sheet


def _draw_panel(
    sheet: Image.Image, panel: Panel, lines: Sequence[str], left: int, top: int, side: int
) -> None:
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for number, (image, title) in enumerate(zip(panel.images, panel.titles, strict=True)):
        x = left + number * (side + _MARGIN)
        draw.text((x, top), title, fill="black", font=font)
        small = min(image.shape[1:]) < side
        drawn = Image.fromarray(to_uint8(image)).resize(
            (side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        )
        sheet.paste(drawn, (x, top + _LINE_HEIGHT))
    below = top + _LINE_HEIGHT + side + 2
    for number, line in enumerate(lines):
        draw.text((left, below + number * _LINE_HEIGHT), line, fill="#444444", font=font)


def _wrap(caption: str, width: int, max_lines: int) -> list[str]:
    characters = max(20, int(width / (_FONT_SIZE * 0.5)))
    return textwrap.wrap(caption, characters, max_lines=max_lines, placeholder=" ...") or [""]
