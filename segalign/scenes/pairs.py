"""Preference pairs of scenes: the true picture, and one that shows a stated fact wrongly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from segalign.errors import ConfigError
from segalign.rng import counter_seed, counter_uniform
from segalign.scenes.accuracy import WITHIN_77
from segalign.scenes.grammar import (
    ATTRIBUTES,
    CaptionLength,
    Fact,
    caption_sentences,
    join_sentences,
    num_caption_tokens,
)
from segalign.scenes.questions import ANSWERS
from segalign.scenes.renderer import render
from segalign.scenes.samples import describe
from segalign.scenes.world import Scene, World, get_world, random_scene

EditPosition = Literal["any", "past_77", "within_77"]
_MAX_WORDINGS: Final = 1000


@dataclass(frozen=True)
class ScenePair:
    """Two pictures of one caption with ground truth.

    Attributes:
        images: RGB, uint8 ``(H, W, 3)`` each.
        caption: The text; every statement holds in the preferred picture.
        preference_probs: (1, 0) or (0, 1); a tie, whose pictures are equal, is (0.5, 0.5).
        metadata: JSON-able: as that of `SceneSample`, of the true scene, and ``edited``: what the
            other picture shows wrongly (``kind``, ``cell``, ``value`` stated, ``other`` shown,
            ``start`` and ``end`` of the sentence that states it first); None for a tie.
    """

    images: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    caption: str
    preference_probs: tuple[float, float]
    metadata: dict[str, Any]


def make_pair(
    world: str,
    seed: int,
    index: int,
    *,
    length: CaptionLength = "long",
    edit_position: EditPosition = "any",
    tie_share: float = 0.0,
) -> ScenePair:
    """Make pair ``index`` of the stream ``seed``; a pure function of its arguments.

    The scene is that of `make_sample`, and so is the caption, unless it states no fact at the
    wanted place; then the scene is worded anew until one does. Which fact is edited, to what, which
    place the true picture has and whether the pair is a tie are independent draws.

    Args:
        world: Name of a world.
        seed: Names the stream, >= 0.
        index: Position in the stream, >= 0.
        length: Length class of the caption.
        edit_position: Where the sentence that states the edited fact first may stand: anywhere, or
            within or past the 77 positions of a CLIP encoder (see `token_bucket`).
        tie_share: Share of ties, in [0, 1].

    Raises:
        ConfigError: If there is no such world, ``tie_share`` is no share, or captions of this
            length never state a fact at that place.
    """
    _check_settings(length, edit_position, tie_share)
    place = get_world(world)
    scene = random_scene(place, Random(counter_seed("scene", seed, index)))  # noqa: S311
    caption, facts = _word_scene(scene, place, (seed, index), length, edit_position)
    metadata = describe(world, scene, facts)
    true = render(scene, place)
    if counter_uniform("pair_tie", seed, index) < tie_share:
        return ScenePair((true, true.copy()), caption, (0.5, 0.5), {**metadata, "edited": None})
    drawing = Random(counter_seed("pair_edit", seed, index))  # noqa: S311
    fact = drawing.choice(_editable(caption, facts, edit_position))
    other = drawing.choice([answer for answer in ANSWERS[fact.kind] if answer != fact.value])
    wrong = render(edit_scene(scene, fact.cell, fact.kind, other), place)
    metadata["edited"] = {**vars(fact), "other": other}
    if counter_uniform("pair_place", seed, index) < 0.5:
        return ScenePair((true, wrong), caption, (1.0, 0.0), metadata)
    return ScenePair((wrong, true), caption, (0.0, 1.0), metadata)


def edit_scene(scene: Scene, cell: int, kind: str, value: str) -> Scene:
    """Change one attribute of one object.

    Args:
        scene: The scene; it is left as it is.
        cell: Index of a place that holds an object.
        kind: ``shape``, ``colour`` or ``size``.
        value: Its new value.
    """
    content = scene.cells[cell]
    assert content is not None, cell
    cells = list(scene.cells)
    changes: Mapping[str, Any] = {kind: value}
    cells[cell] = replace(content, **changes)
    return replace(scene, cells=tuple(cells))


def _check_settings(length: str, edit_position: str, tie_share: float) -> None:
    if not 0 <= tie_share <= 1:
        raise ConfigError(
            f"the share of ties must be in [0, 1]; got {tie_share}; choose a share of the pairs"
        )
    if edit_position not in _PLACES:
        known = ", ".join(f"`{name}`" for name in _PLACES)
        raise ConfigError(
            f"the place of edited facts must be one of {known}; got `{edit_position}`; choose one"
        )
    if length == "short" and edit_position == "past_77":
        raise ConfigError(
            "edited facts past token 77 need captions of length `long` or `very_long`; "
            "got `short`, which ends before; choose another length or place"
        )


def _word_scene(
    scene: Scene, world: World, counters: tuple[int, int], length: CaptionLength, place: str
) -> tuple[str, list[Fact]]:
    """Word a scene until a fact stands at the wanted place; the first is `make_sample`'s."""
    for attempt in range(_MAX_WORDINGS):
        purpose = f"caption/{length}" + (f"/{attempt}" if attempt else "")
        wording = Random(counter_seed(purpose, *counters))  # noqa: S311
        caption, facts = join_sentences(caption_sentences(scene, world, wording, length))
        if _editable(caption, facts, place):
            return caption, facts
    raise AssertionError(f"no wording of scene {counters} states a fact at {place}")


def _editable(caption: str, facts: list[Fact], place: str) -> list[Fact]:
    stands_there = _PLACES[place]
    return [fact for fact in facts if fact.kind in ATTRIBUTES and stands_there(caption, fact)]


_PLACES: Final[Mapping[str, Callable[[str, Fact], bool]]] = {
    "any": lambda caption, fact: True,
    "past_77": lambda caption, fact: num_caption_tokens(caption[: fact.start]) >= WITHIN_77,
    "within_77": lambda caption, fact: num_caption_tokens(caption[: fact.end]) <= WITHIN_77,
}
