"""Rendering of scenes to pixels, antialiased and exact."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from segalign.scenes.world import (
    BACKGROUNDS,
    CELL_PIXELS,
    COLOURS,
    SIZES,
    Scene,
    SceneObject,
    World,
)

_SUPERSAMPLING = 8


def render(scene: Scene, world: World) -> NDArray[np.uint8]:
    """Render a scene.

    Returns:
        RGB image, uint8 ``(H, W, 3)``.
    """
    rows = world.num_rows
    cells = [render_cell(content, scene.background) for content in scene.cells]
    lines = [np.concatenate(cells[row * rows : (row + 1) * rows], axis=1) for row in range(rows)]
    return np.round(np.concatenate(lines, axis=0) * 255).astype(np.uint8)


def render_cell(content: SceneObject | None, background: str) -> NDArray[np.float64]:
    """Render one cell, float in [0, 1], ``(CELL_PIXELS, CELL_PIXELS, 3)``."""
    backdrop = np.broadcast_to(BACKGROUNDS[background], (CELL_PIXELS, CELL_PIXELS, 3))
    if content is None:
        return backdrop.copy()
    coverage = _coverage(content.shape, SIZES[content.size])[..., None]
    return backdrop * (1 - coverage) + np.asarray(COLOURS[content.colour]) * coverage


@cache
def _coverage(shape: str, radius: float) -> NDArray[np.float64]:
    """Share of each pixel that the shape covers, ``(CELL_PIXELS, CELL_PIXELS)``."""
    side = CELL_PIXELS * _SUPERSAMPLING
    centres = (np.arange(side) + 0.5) / _SUPERSAMPLING - CELL_PIXELS / 2
    inside = _inside(shape, centres[None, :] / radius, centres[:, None] / radius)
    blocks = inside.reshape(CELL_PIXELS, _SUPERSAMPLING, CELL_PIXELS, _SUPERSAMPLING)
    coverage: NDArray[np.float64] = blocks.mean(axis=(1, 3))
    return coverage


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points belong to the shape of radius 1; y grows downwards."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    box = (np.abs(x) <= 0.9) & (np.abs(y) <= 0.9)
    if shape == "square":
        return box
    if shape == "triangle":
        return box & (np.abs(x) <= (y + 0.9) / 2)
    return box & ((np.abs(x) <= 0.3) | (np.abs(y) <= 0.3))
