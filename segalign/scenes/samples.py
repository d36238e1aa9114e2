"""Samples of the benchmark: a scene, its picture, its caption and the facts that this states."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segalign.rng import counter_seed
from segalign.scenes.grammar import CaptionLength, Fact, caption_sentences, join_sentences
from segalign.scenes.renderer import render
from segalign.scenes.world import Scene, get_world, random_scene


@dataclass(frozen=True)
class SceneSample:
    """One image-caption pair with ground truth.

    Attributes:
        image: RGB, uint8 ``(H, W, 3)``.
        caption: The text.
        metadata: JSON-able: ``world``, ``scene`` (background, cells), ``facts`` (kind, cell, value,
            first character and end (exclusive) of the sentence that states it).
    """

    image: NDArray[np.uint8]
    caption: str
    metadata: dict[str, Any]


def make_sample(
    world: str, seed: int, index: int, *, length: CaptionLength = "long"
) -> SceneSample:
    """Make sample ``index`` of the stream ``seed``; a pure function of its arguments.

    Args:
        world: Name of a world.
        seed: Names the stream, >= 0.
        index: Position in the stream, >= 0.
        length: Length class of the caption; the scene does not depend on it.

    Raises:
        ConfigError: If there is no such world.
    """
    place = get_world(world)
    scene = random_scene(place, Random(counter_seed("scene", seed, index)))  # noqa: S311
    wording = Random(counter_seed(f"caption/{length}", seed, index))  # noqa: S311
    caption, facts = join_sentences(caption_sentences(scene, place, wording, length))
    return SceneSample(render(scene, place), caption, describe(world, scene, facts))


def describe(world: str, scene: Scene, facts: Sequence[Fact]) -> dict[str, Any]:
    """Return the metadata of a sample; see `SceneSample`."""
    return {
        "world": world,
        "scene": asdict(scene),
        "facts": [[fact.kind, fact.cell, fact.value, fact.start, fact.end] for fact in facts],
    }
