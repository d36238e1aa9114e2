import json
import math
from collections import Counter
from pathlib import PurePath

import pytest
import torch

from segalign.errors import DataError
from segalign.tree_codec import decode_tree, encode_tree


def round_trip(tree):
    document, tensors = encode_tree(tree)
    return decode_tree(json.loads(json.dumps(document, allow_nan=False)), tensors)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"a": None, "b": True, "c": -3, "d": 0.1, "e": "ü", "f": []},
        {"a": (1, (2.5, [None, ()])), "b": {"c": {}}},
        {0: "zero", "one": 1, -5: {"x": 2}},
        {"$tensor": 1},
        {"$odd": {"$tuple": [1]}},
        {"inf": math.inf, "minus": -math.inf},
        [2**80, 5e-324, 1.7976931348623157e308, 0.1 + 0.2],
        {"milestones": Counter({3: 1, 5: 2})},
    ],
)
def test_plain_trees_come_back_equal(tree):
    back = round_trip(tree)
    assert back == tree
    assert repr(back) == repr(tree)  # tells 1 from True and 1.0, tuple from list, key order


def test_nan_comes_back():
    assert math.isnan(round_trip({"a": math.nan})["a"])


def test_string_keyed_dicts_stay_plain_json():
    assert encode_tree({"config": {"lr": 0.1}})[0] == {"config": {"lr": 0.1}}


def test_tensors_go_to_the_file_of_their_branch():
    one, two, three, four = (torch.full((2,), float(i)) for i in range(4))
    tree = {
        "state_dict": {"net.weight": one},
        "optimizer_states": [{"state": {0: {"exp_avg": two}}}],
        "ema": {"weights": {"net.weight": three}, "num_updates": 4},
        "callbacks": {"X": {"total": four}},
    }
    document, tensors = encode_tree(tree)
    assert {stem: list(named) for stem, named in tensors.items()} == {
        "model": ["net.weight"],
        "optimizer": ["0.state.0.exp_avg"],
        "ema": ["net.weight"],
        "extra": ["callbacks.X.total"],
    }
    back = decode_tree(document, tensors)
    assert back["optimizer_states"][0]["state"][0]["exp_avg"] is two
    assert back["callbacks"]["X"]["total"] is four


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [0, {"b": PurePath("x")}]}, r"at `a\.1\.b`; got pathlib"),
        ({"a": {1.5: 2}}, r"str or int keys at `a`; got 1\.5"),
        ({"a": {1, 2}}, r"at `a`; got builtins\.set"),
        ({"a": len}, "at `a`"),
        ({"state_dict": {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}}, "named `a.b`"),
    ],
)
def test_other_types_are_refused_by_their_place(tree, message):
    with pytest.raises(TypeError, match=message):
        encode_tree(tree)


def test_unknown_tags_are_refused():
    with pytest.raises(ValueError, match=r"unknown tag `\$evil`"):
        decode_tree({"$evil": 1}, {})


@pytest.mark.parametrize(
    "document",
    [
        {"$tensor": 5},
        {"$tensor": ["model", "gone"]},
        {"$tensor": [[], {}]},
        {"$float": [1]},
        {"$float": "x"},
        {"$tuple": 3},
        {"$dict": [1]},
        {"$dict": [[[], 1]]},
        {"$counter": [[{}, 1]]},
    ],
)
def test_a_foreign_document_is_refused_in_a_line(document):
    with pytest.raises(DataError, match=r"^expected state as a run stores it.*; got .*; choose"):
        decode_tree({"a": [document]}, {})


def test_nesting_beyond_the_interpreter_is_refused():
    document = []
    for _ in range(100_000):
        document = [document]
    with pytest.raises(DataError, match="too deep"):
        decode_tree(document, {})
