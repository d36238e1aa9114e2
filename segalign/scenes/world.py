"""Worlds: which scenes exist, and drawing one at random.

A scene is a square grid of cells on a plain background; a cell is empty or holds one object, which
has a shape, a colour and a size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from segalign.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.65, 0.15, 0.80),
    "cyan": (0.10, 0.80, 0.85),
}
SIZES: Mapping[str, float] = {"small": 3.0, "large": 5.0}
BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.97),
    "grey": (0.50, 0.50, 0.50),
    "black": (0.04, 0.04, 0.04),
    "brown": (0.45, 0.27, 0.12),
}
CELL_PIXELS = 12


@dataclass(frozen=True, kw_only=True)
class World:
    """The scenes that can occur.

    Attributes:
        name: How configs call it.
        places: Names of the cells in reading order; their number is a square.
        min_objects: Fewest objects in a scene.
        max_objects: Most objects in a scene.
    """

    name: str
    places: tuple[str, ...]
    min_objects: int
    max_objects: int

    @property
    def num_rows(self) -> int:
        """Rows of the grid, as many as columns."""
        return math.isqrt(len(self.places))

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.num_rows * CELL_PIXELS


WORLDS: Mapping[str, World] = {
    "3x3": World(
        name="3x3",
        places=(
            "top left",
            "top middle",
            "top right",
            "middle left",
            "centre",
            "middle right",
            "bottom left",
            "bottom middle",
            "bottom right",
        ),
        min_objects=4,
        max_objects=8,
    ),
    "2x2": World(
        name="2x2",
        places=("top left", "top right", "bottom left", "bottom right"),
        min_objects=4,
        max_objects=4,
    ),
}


def get_world(name: str) -> World:
    """Look a world up by name.

    Raises:
        ConfigError: If there is no such world.
    """
    if name not in WORLDS:
        known = ", ".join(f"`{known}`" for known in WORLDS)
        raise ConfigError(f"expected a world among {known}; got `{name}`. Choose one of them.")
    return WORLDS[name]


@dataclass(frozen=True)
class SceneObject:
    """What one cell holds."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        background: Name of the background colour.
        cells: One entry for each place of the world; None is an empty cell.
    """

    background: str
    cells: tuple[SceneObject | None, ...]


def random_scene(world: World, random: Random) -> Scene:
    """Draw a scene; every attribute is uniform and independent."""
    count = random.randint(world.min_objects, world.max_objects)
    occupied = set(random.sample(range(len(world.places)), count))
    cells = tuple(
        _random_object(random) if place in occupied else None for place in range(len(world.places))
    )
    return Scene(random.choice(tuple(BACKGROUNDS)), cells)


def _random_object(random: Random) -> SceneObject:
    return SceneObject(
        random.choice(SHAPES), random.choice(tuple(COLOURS)), random.choice(tuple(SIZES))
    )
