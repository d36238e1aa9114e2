"""Questions about a scene whose answers are segments: supervision for dense segment-level training.

Dims: B batch, Q questions, K answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from segalign.scenes.grammar import (
    ATTRIBUTE_WORDINGS,
    ATTRIBUTES,
    BACKGROUND_WORDINGS,
)
from segalign.scenes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, World

ANSWERS: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class QuestionBank:
    """One wording of every question.

    Attributes:
        kinds: Fact kind of each question, ``Q``.
        segments: All answers, as self-contained sentences.
        table: Row of ``segments`` for each question and answer, int64 ``(Q, K)``; -1 pads.
    """

    kinds: tuple[str, ...]
    segments: tuple[str, ...]
    table: Tensor


def draw_question_bank(world: World, random: Random) -> QuestionBank:
    """Word every question anew: three attributes of each cell, then the background."""
    kinds: list[str] = []
    segments: list[str] = []
    rows: list[list[int]] = []
    for place in world.places:
        for kind in ATTRIBUTES:
            wording = random.choice(ATTRIBUTE_WORDINGS[kind])
            kinds.append(kind)
            rows.append(_append(segments, wording, kind, place))
    kinds.append("background")
    rows.append(_append(segments, random.choice(BACKGROUND_WORDINGS), "background", ""))
    width = max(map(len, rows))
    table = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    return QuestionBank(tuple(kinds), tuple(segments), table)


def _append(segments: list[str], wording: str, kind: str, place: str) -> list[int]:
    start = len(segments)
    segments += [wording.format(place=place, **{kind: value}) for value in ANSWERS[kind]]
    return list(range(start, len(segments)))


def question_answers(metadata: Sequence[Mapping[str, Any]], world: World) -> Tensor:
    """Look up the right answers in the ground truth.

    Args:
        metadata: ``B`` samples' metadata; one without a scene (an invalid sample) answers nothing.
        world: Where they come from.

    Returns:
        int64 ``(B, Q)``; -1 where a cell is empty.
    """
    return torch.tensor([_scene_answers(sample.get("scene"), world) for sample in metadata])


def _scene_answers(scene: Mapping[str, Any] | None, world: World) -> list[int]:
    if scene is None:
        return [-1] * (len(ATTRIBUTES) * len(world.places) + 1)
    answers = [
        -1 if content is None else ANSWERS[kind].index(content[kind])
        for content in scene["cells"]
        for kind in ATTRIBUTES
    ]
    return [*answers, ANSWERS["background"].index(scene["background"])]


def answer_logits(similarities: Tensor, table: Tensor) -> Tensor:
    """Arrange image-segment similarities by question.

    Args:
        similarities: Scaled similarities ``(B, num_segments)``.
        table: int64 ``(Q, K)`` of a `QuestionBank`.

    Returns:
        ``(B, Q, K)``, -inf at padding.
    """
    logits = similarities[:, table.clamp(min=0)]
    return logits.masked_fill(table < 0, float("-inf"))


def edit_caption(caption: str, facts: Sequence[Sequence[Any]], random: Random) -> str:
    """Change one stated attribute of a caption to another value.

    Args:
        caption: The caption.
        facts: Rows (kind, cell, value, start, end) of its metadata.
        random: Draws the fact and the new value.

    Returns:
        The edited caption; the caption itself if it states no attribute. A fact that the caption
        repeats in other words is edited in its first statement only.
    """
    editable = [fact for fact in facts if fact[0] in ATTRIBUTES]
    if not editable:
        return caption
    kind, _, value, start, end = random.choice(editable)
    other = random.choice([answer for answer in ANSWERS[kind] if answer != value])
    return caption[:start] + caption[start:end].replace(value, other, 1) + caption[end:]


def one_segment(
    caption: str, facts: Sequence[Sequence[Any]], random: Random
) -> tuple[str, list[list[Any]]]:
    """Draw a sentence that states a fact.

    Returns:
        The sentence, and its facts with positions inside it; the whole caption if it states none.
    """
    if not facts:
        return caption, []
    _, _, _, start, end = random.choice(facts)
    return caption[start:end], [
        [kind, cell, value, 0, end - start]
        for kind, cell, value, fact_start, _ in facts
        if fact_start == start
    ]
