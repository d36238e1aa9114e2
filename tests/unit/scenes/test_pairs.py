"""Preference pairs of scenes: what is edited, where, which picture is the true one."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from segalign.errors import ConfigError
from segalign.scenes.grammar import ATTRIBUTES, num_caption_tokens
from segalign.scenes.pairs import edit_scene, make_pair
from segalign.scenes.renderer import render
from segalign.scenes.samples import make_sample
from segalign.scenes.world import Scene, SceneObject, get_world
from segalign.text.tokenizer import clip_tokenizer, word_token_ids

WORLDS = ("3x3", "2x2")


def scene_of(pair) -> Scene:
    """Build the true scene from a pair's metadata."""
    cells = [content and SceneObject(**content) for content in pair.metadata["scene"]["cells"]]
    return Scene(pair.metadata["scene"]["background"], tuple(cells))


def preferred(pair):
    return pair.images[int(pair.preference_probs[1])]


def other(pair):
    return pair.images[int(pair.preference_probs[0])]


def test_a_pair_is_a_function_of_its_arguments():
    one, two = make_pair("3x3", 3, 7), make_pair("3x3", 3, 7)
    assert all((a == b).all() for a, b in zip(one.images, two.images, strict=True))
    assert (one.caption, one.metadata) == (two.caption, two.metadata)
    assert one.preference_probs == two.preference_probs
    assert make_pair("3x3", 4, 7).caption != one.caption
    json.dumps(one.metadata)


@pytest.mark.parametrize("world", WORLDS)
def test_scene_caption_and_facts_are_those_of_the_sample(world):
    for index in range(20):
        pair, sample = make_pair(world, 1, index), make_sample(world, 1, index)
        assert pair.caption == sample.caption
        assert {k: v for k, v in pair.metadata.items() if k != "edited"} == sample.metadata
        assert (preferred(pair) == sample.image).all()


@pytest.mark.parametrize("world", WORLDS)
def test_one_stated_attribute_differs_and_nothing_else(world):
    for index in range(60):
        pair = make_pair(world, 0, index)
        edited = pair.metadata["edited"]
        fact = [edited[name] for name in ("kind", "cell", "value", "start", "end")]
        assert fact in pair.metadata["facts"]
        assert edited["kind"] in ATTRIBUTES
        assert edited["value"] in pair.caption[edited["start"] : edited["end"]]
        assert edited["other"] != edited["value"]
        wrong = edit_scene(scene_of(pair), edited["cell"], edited["kind"], edited["other"])
        assert (other(pair) == render(wrong, get_world(world))).all()
        changed = np.argwhere((pair.images[0] != pair.images[1]).any(axis=-1)) // 12
        places = {int(row) * get_world(world).num_rows + int(column) for row, column in changed}
        assert places == {edited["cell"]}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", ["long", "very_long"])
def test_the_edited_fact_stands_where_it_is_asked_for(world, length):
    tokenizer = clip_tokenizer()
    for index in range(40):
        late = make_pair(world, 0, index, length=length, edit_position="past_77")
        start = late.metadata["edited"]["start"]
        # A 77-position encoder reads 75 tokens; the statement begins after them.
        assert len(word_token_ids(late.caption[:start], tokenizer)) >= 75
        first = late.metadata["edited"]
        values = {(kind, cell): begin for kind, cell, _, begin, _ in late.metadata["facts"]}
        assert values[first["kind"], first["cell"]] == start
        early = make_pair(world, 0, index, length=length, edit_position="within_77")
        end = early.metadata["edited"]["end"]
        assert len(word_token_ids(early.caption[:end], tokenizer)) <= 75


def test_a_scene_is_worded_anew_until_a_fact_stands_there():
    pairs = [make_pair("2x2", 0, index, edit_position="past_77") for index in range(80)]
    samples = [make_sample("2x2", 0, index) for index in range(80)]
    same = [pair.caption == sample.caption for pair, sample in zip(pairs, samples, strict=True)]
    assert 0 < same.count(False) < 40
    for pair, sample in zip(pairs, samples, strict=True):
        assert pair.metadata["scene"] == sample.metadata["scene"]
        assert num_caption_tokens(pair.caption) > 75


def test_places_kinds_and_ties_are_drawn_evenly():
    pairs = [make_pair("2x2", 5, index, tie_share=0.25) for index in range(400)]
    ties = [pair for pair in pairs if pair.preference_probs == (0.5, 0.5)]
    clear = [pair for pair in pairs if pair.preference_probs != (0.5, 0.5)]
    assert 70 < len(ties) < 130
    assert all(pair.metadata["edited"] is None for pair in ties)
    assert all((pair.images[0] == pair.images[1]).all() for pair in ties)
    firsts = sum(pair.preference_probs == (1.0, 0.0) for pair in clear)
    assert 0.4 < firsts / len(clear) < 0.6
    kinds = [pair.metadata["edited"]["kind"] for pair in clear]
    assert all(kinds.count(kind) > len(clear) / 5 for kind in ATTRIBUTES)


def test_ties_do_not_change_the_other_pairs():
    for index in range(40):
        plain, mixed = make_pair("2x2", 2, index), make_pair("2x2", 2, index, tie_share=0.5)
        assert plain.caption == mixed.caption
        if mixed.metadata["edited"] is not None:
            assert plain.metadata == mixed.metadata
            assert plain.preference_probs == mixed.preference_probs


def test_editing_leaves_the_scene_as_it_was():
    scene = Scene("white", (SceneObject("circle", "red", "small"), None))
    before = asdict(scene)
    edited = edit_scene(scene, 0, "colour", "blue")
    assert edited.cells == (SceneObject("circle", "blue", "small"), None)
    assert asdict(scene) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world": "9x9"}, r"^expected a world among `3x3`, `2x2`; got `9x9`\."),
        ({"tie_share": 1.5}, r"^the share of ties must be in \[0, 1\]; got 1.5; choose"),
        ({"tie_share": float("nan")}, r"^the share of ties must be in \[0, 1\]; got nan; choose"),
        ({"edit_position": "late"}, r"one of `any`, `past_77`, `within_77`; got `late`; choose"),
        (
            {"length": "short", "edit_position": "past_77"},
            r"^edited facts past token 77 need captions of length `long` or `very_long`; got `sho",
        ),
    ],
)
def test_settings_that_cannot_be_met(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_pair(**{"world": "3x3", "seed": 0, "index": 0, **settings})
