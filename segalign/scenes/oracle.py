"""The oracle: reads a picture of a scene back, exactly.

Dims: B batch, G backgrounds, P places, C cell contents, D values of one cell.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from segalign.scenes.renderer import render_cell
from segalign.scenes.world import (
    BACKGROUNDS,
    CELL_PIXELS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    World,
)


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in ``B`` images.

    Attributes:
        scenes: The nearest scene of each image.
        distances: Root mean square pixel distance to that scene, float ``(B,)``.
    """

    scenes: list[Scene]
    distances: Tensor


def read_scenes(images: Tensor, world: World) -> Reading:
    """Find the nearest scene: the best content for every cell, given the best background.

    Args:
        images: Float in [0, 1], ``(B, 3, H, W)``, of the world's size.
        world: Where the images come from.

    Returns:
        The nearest scenes. No gradient.

    Raises:
        ValueError: If the images have another size than the world's.
    """
    size = world.image_size
    if images.shape[1:] != (3, size, size):
        raise ValueError(f"expected images (B, 3, {size}, {size}); got {tuple(images.shape)}")
    cells = _split_cells(images.detach().double().cpu(), world)
    per_cell, contents = _squared_distances(cells, _templates()).min(dim=-1)
    total, backgrounds = per_cell.sum(dim=-1).min(dim=-1)
    chosen = contents[torch.arange(len(images)), backgrounds]
    scenes = [
        Scene(tuple(BACKGROUNDS)[background], tuple(_contents()[content] for content in row))
        for background, row in zip(backgrounds.tolist(), chosen.tolist(), strict=True)
    ]
    return Reading(scenes, (total / (3 * size * size)).sqrt().float())


def _squared_distances(cells: Tensor, templates: Tensor) -> Tensor:
    """Compare cells ``(B, P, D)`` with templates ``(G, C, D)``, float64 ``(B, G, P, C)``.

    As |c|^2 - 2 c.t + |t|^2, a product of matrices; float64 leaves 1e-13 of what cancels.
    """
    products = torch.einsum("bpd,gcd->bgpc", cells, templates)
    lengths = cells.square().sum(-1)[:, None, :, None]
    squared = lengths - 2 * products + templates.square().sum(-1)[None, :, None, :]
    return squared.clamp(min=0)


def _split_cells(images: Tensor, world: World) -> Tensor:
    """Cut images into cells, ``(B, P, D)``."""
    rows = world.num_rows
    grid = images.reshape(len(images), 3, rows, CELL_PIXELS, rows, CELL_PIXELS)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@cache
def _contents() -> tuple[SceneObject | None, ...]:
    """List everything that a cell can hold."""
    objects = [
        SceneObject(shape, colour, size) for shape in SHAPES for colour in COLOURS for size in SIZES
    ]
    return (None, *objects)


@cache
def _templates() -> Tensor:
    """Render every content on every background, ``(G, C, D)``."""
    cells = [[render_cell(content, name) for content in _contents()] for name in BACKGROUNDS]
    return torch.from_numpy(np.stack(cells)).double().flatten(2)
