"""Captions of scenes: self-contained sentences in several wordings, each with the facts it states.

All words but ``cyan`` are single tokens of the CLIP vocabulary, so the tokens of a caption can be
counted without a tokenizer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from segalign.scenes.world import Scene, SceneObject, World

CaptionLength = Literal["short", "long", "very_long"]
FACT_KINDS = ("shape", "colour", "size", "occupancy", "background")
ATTRIBUTES = ("shape", "colour", "size")

OBJECT_WORDINGS = (
    "A {size} {colour} {shape} sits in the {place}.",
    "In the {place} there is a {size} {colour} {shape}.",
    "The {place} holds a {size} {colour} {shape}.",
    "You can see a {size} {colour} {shape} in the {place}.",
    "There is a {shape} in the {place}, it is {colour} and {size}.",
)
ATTRIBUTE_WORDINGS = {
    "shape": (
        "The object in the {place} is a {shape}.",
        "In the {place} you can see a {shape}.",
        "The thing in the {place} looks like a {shape}.",
    ),
    "colour": (
        "The object in the {place} is {colour}.",
        "In the {place} the color is {colour}.",
        "Someone painted the {place} object in {colour}.",
    ),
    "size": (
        "The object in the {place} is {size}.",
        "In the {place} the object looks {size}.",
        "The {place} object has a {size} size.",
    ),
}
EMPTY_WORDINGS = (
    "The {place} is {occupancy}.",
    "The cell in the {place} stays {occupancy}.",
)
BACKGROUND_WORDINGS = (
    "The background is {background}.",
    "Everything lies on a {background} background.",
    "Behind all of it there is plain {background}.",
)
STYLE_SENTENCES = (
    "The picture has a calm and simple mood.",
    "The style is clean, flat and modern.",
    "It feels like a page from a book for children.",
    "The light is even and there are no shadows.",
    "The whole image looks tidy and well planned.",
    "There is a playful feeling in this work.",
    "The edges are sharp and the paint is even.",
    "It would look good on the wall of a school.",
    "The artist used only a few basic forms.",
    "Nothing in this picture moves or makes a sound.",
    "One can look at it for a long time.",
    "The design is honest and easy to read.",
)
MAX_SHORT_TOKENS = 75


@dataclass(frozen=True)
class Fact:
    """One checkable statement of a caption.

    Attributes:
        kind: One of `FACT_KINDS`.
        cell: Index of the place; -1 for the background.
        value: What is stated.
        start: Character where the sentence that states it first begins.
        end: Character where that sentence ends.
    """

    kind: str
    cell: int
    value: str
    start: int
    end: int


@dataclass(frozen=True)
class Sentence:
    """A sentence and the (kind, cell, value) that it states."""

    text: str
    facts: tuple[tuple[str, int, str], ...]


def num_caption_tokens(text: str) -> int:
    """Count the CLIP tokens of a scenes caption, start and end tokens left out."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + text.count("cyan")


def object_sentence(content: SceneObject, cell: int, world: World, random: Random) -> Sentence:
    """State the three attributes of an object in one sentence."""
    values = vars(content)
    text = random.choice(OBJECT_WORDINGS).format(place=world.places[cell], **values)
    return Sentence(text, tuple((kind, cell, values[kind]) for kind in ATTRIBUTES))


def attribute_sentence(kind: str, value: str, cell: int, world: World, random: Random) -> Sentence:
    """State one attribute of an object."""
    wording = random.choice(ATTRIBUTE_WORDINGS[kind])
    text = wording.format(place=world.places[cell], **{kind: value})
    return Sentence(text, ((kind, cell, value),))


def empty_sentence(cell: int, world: World, random: Random) -> Sentence:
    """State that a cell is empty."""
    text = random.choice(EMPTY_WORDINGS).format(place=world.places[cell], occupancy="empty")
    return Sentence(text, (("occupancy", cell, "empty"),))


def background_sentence(background: str, random: Random) -> Sentence:
    """State the background."""
    text = random.choice(BACKGROUND_WORDINGS).format(background=background)
    return Sentence(text, (("background", -1, background),))


def caption_sentences(
    scene: Scene, world: World, random: Random, length: CaptionLength
) -> list[Sentence]:
    """Choose the sentences of a caption, in their final order.

    ``short`` fits the 77 positions of a CLIP encoder; ``long`` leaves facts out in a third of the
    captions, repeats some in other words and adds sentences without facts; ``very_long`` adds so
    many of those that the caption has 360 to 690 tokens.
    """
    if length == "short":
        return _fit_short(_scene_sentences(scene, world, random, 0.85), random)
    sentences = _scene_sentences(scene, world, random)
    if random.random() < 1 / 3:
        sentences = [sentence for sentence in sentences if random.random() > 0.3] or sentences
    sentences += random.sample(STYLE_AS_SENTENCES, random.randint(0, 6))
    if random.random() < 0.5:
        again = _scene_sentences(scene, world, random)
        sentences += random.sample(again, random.randint(1, len(again)))
    if length == "very_long":
        sentences = _lengthen(sentences, scene, world, random)
    random.shuffle(sentences)
    return sentences


def join_sentences(sentences: Sequence[Sentence]) -> tuple[str, list[Fact]]:
    """Write sentences as a caption, and locate every fact at its first statement."""
    parts: list[str] = []
    facts: dict[tuple[str, int], Fact] = {}
    position = 0
    for sentence in sentences:
        end = position + len(sentence.text)
        for kind, cell, value in sentence.facts:
            facts.setdefault((kind, cell), Fact(kind, cell, value, position, end))
        parts.append(sentence.text)
        position += len(sentence.text) + 1
    return " ".join(parts), list(facts.values())


def _scene_sentences(
    scene: Scene, world: World, random: Random, whole_objects: float = 0.6
) -> list[Sentence]:
    """State a scene; a share of the objects in one sentence, the others attribute by attribute."""
    sentences: list[Sentence] = []
    for cell, content in enumerate(scene.cells):
        if content is None:
            if random.random() < 0.5:
                sentences.append(empty_sentence(cell, world, random))
        elif random.random() < whole_objects:
            sentences.append(object_sentence(content, cell, world, random))
        else:
            sentences += [
                attribute_sentence(kind, getattr(content, kind), cell, world, random)
                for kind in ATTRIBUTES
            ]
    if random.random() < 0.8:
        sentences.append(background_sentence(scene.background, random))
    return sentences


def _fit_short(sentences: list[Sentence], random: Random) -> list[Sentence]:
    sentences = sentences + random.sample(STYLE_AS_SENTENCES, random.randint(0, 1))
    random.shuffle(sentences)
    limit = random.choice((MAX_SHORT_TOKENS // 2, MAX_SHORT_TOKENS, MAX_SHORT_TOKENS))
    kept: list[Sentence] = []
    total = 0
    for sentence in sentences:
        tokens = num_caption_tokens(sentence.text)
        if total + tokens <= limit:
            kept.append(sentence)
            total += tokens
    return kept or sentences[:1]


def _lengthen(
    sentences: list[Sentence], scene: Scene, world: World, random: Random
) -> list[Sentence]:
    target = random.randint(365, 675)
    total = sum(num_caption_tokens(sentence.text) for sentence in sentences)
    while total < target:
        pool = _scene_sentences(scene, world, random) + list(STYLE_AS_SENTENCES)
        sentence = random.choice(pool)
        sentences.append(sentence)
        total += num_caption_tokens(sentence.text)
    return sentences


STYLE_AS_SENTENCES = tuple(Sentence(text, ()) for text in STYLE_SENTENCES)
