"""Fact accuracy: which of a caption's statements hold in its picture.

Accuracies are counts, so that they add up over batches and ranks.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from segalign.scenes.grammar import ATTRIBUTES
from segalign.scenes.world import Scene

# Positions are token indices with the start token at 0. A 77-position encoder reads tokens 1..75
# of a longer caption, a 32-position one 1..30; a sentence across the border of 77, which is read in
# part, is neither within nor past.
WITHIN_32 = 30
WITHIN_77 = 75


class FactRecord(NamedTuple):
    """A stated fact: what, where, and between which token positions."""

    kind: str
    cell: int
    value: str
    first_token: int
    last_token: int


def fact_holds(fact: FactRecord, scene: Scene) -> bool:
    """Check one fact against what the oracle saw."""
    if fact.kind == "background":
        return scene.background == fact.value
    content = scene.cells[fact.cell]
    if fact.kind == "occupancy":
        return (content is None) == (fact.value == "empty")
    return content is not None and getattr(content, fact.kind) == fact.value


def fact_records(
    facts: Iterable[Sequence[Any]], token_positions: Sequence[int]
) -> list[FactRecord]:
    """Place the facts of a sample's metadata on the caption's token positions.

    Args:
        facts: Rows (kind, cell, value, first character, end character).
        token_positions: Token index of every character of the caption.
    """
    return [
        FactRecord(kind, cell, value, token_positions[start], token_positions[end - 1])
        for kind, cell, value, start, end in facts
    ]


def token_bucket(fact: FactRecord) -> str | None:
    """Name where a fact stands: ``within_32``, ``within_77`` (33 to 77), ``past_77`` or None."""
    if fact.last_token <= WITHIN_32:
        return "within_32"
    if fact.last_token <= WITHIN_77:
        return "within_77"
    return "past_77" if fact.first_token > WITHIN_77 else None


def count_facts(facts: Sequence[FactRecord], scene: Scene) -> Counter[tuple[str, str]]:
    """Count one caption's facts against one picture.

    Returns:
        Counts keyed (name, ``right`` | ``all``). Names: each fact kind; ``attributes`` (shape,
        colour and size together); ``attributes/within_32``, ``attributes/within_77`` (all that
        stand within 77, those within 32 included), ``attributes/past_77``; ``objects`` (all three
        attributes stated and right).
    """
    counts: Counter[tuple[str, str]] = Counter()
    for fact in facts:
        right = fact_holds(fact, scene)
        for name in _names(fact):
            counts[name, "all"] += 1
            counts[name, "right"] += right
    for cell in {fact.cell for fact in facts if fact.kind in ATTRIBUTES}:
        stated = [fact for fact in facts if fact.cell == cell and fact.kind in ATTRIBUTES]
        if len(stated) == len(ATTRIBUTES):
            counts["objects", "all"] += 1
            counts["objects", "right"] += all(fact_holds(fact, scene) for fact in stated)
    return counts


def accuracies(counts: Counter[tuple[str, str]]) -> dict[str, float]:
    """Turn counts into accuracies in [0, 1]; names that were never counted are left out."""
    names = sorted({name for name, part in counts if part == "all" and counts[name, part]})
    return {name: counts[name, "right"] / counts[name, "all"] for name in names}


def _names(fact: FactRecord) -> list[str]:
    if fact.kind not in ATTRIBUTES:
        return [fact.kind]
    names = [fact.kind, "attributes"]
    bucket = token_bucket(fact)
    if bucket == "within_32":
        names.append("attributes/within_32")
    if bucket in ("within_32", "within_77"):
        names.append("attributes/within_77")
    if bucket == "past_77":
        names.append("attributes/past_77")
    return names
