from types import SimpleNamespace

import pytest
import torch
from torch import nn

from segalign.text.frozen_features import FrozenFeatures, execution_device


@pytest.fixture
def model():
    return nn.Linear(1, 4).requires_grad_(False).eval()


@pytest.fixture
def calls():
    return []


@pytest.fixture
def encode(model, calls):
    def run(keys):
        calls.append(list(keys))
        return model(torch.tensor([[float(len(key))] for key in keys])).unbind()

    return run


def test_equal_inputs_are_encoded_once(model, calls, encode):
    features = FrozenFeatures(2**20).encode(model, ["a", "bb", "a"], encode, dropout=0.0)
    assert calls == [["a", "bb"]]
    assert features[0] is features[2]
    assert torch.equal(features[1], model(torch.tensor([2.0])))


def test_known_inputs_are_not_encoded(model, calls, encode):
    kept = FrozenFeatures(2**20)
    kept.encode(model, ["a"], encode, dropout=0.0)
    kept.encode(model, ["bb", "a"], encode, dropout=0.0)
    assert calls == [["a"], ["bb"]]
    assert kept.num_bytes == 2 * 16
    kept.clear()
    assert kept.num_bytes == 0


def test_features_do_not_hold_the_memory_of_their_pass(model, encode):
    kept = FrozenFeatures(2**20)
    for features in kept.encode(model, ["a", "bb"], encode, dropout=0.0):
        assert features.untyped_storage().nbytes() == features.nbytes


def test_nothing_is_kept_where_another_pass_would_differ(model, calls, encode):
    FrozenFeatures(0).encode(model, ["a"], encode, dropout=0.0)
    kept = FrozenFeatures(2**20)
    kept.encode(model.train(), ["a"], encode, dropout=0.1)
    assert kept.num_bytes == 0
    kept.encode(model.train(), ["a"], encode, dropout=0.0)
    assert kept.num_bytes == 16


def test_gradients_are_not_kept(model, encode):
    kept = FrozenFeatures(2**20)
    model.requires_grad_(True)
    features = kept.encode(model, ["a"], encode, dropout=0.0)
    assert features[0].requires_grad
    assert kept.num_bytes == 0
    with torch.no_grad():
        kept.encode(model, ["a"], encode, dropout=0.0)
    assert kept.num_bytes == 16
    assert kept.encode(model, ["a"], encode, dropout=0.0)[0].requires_grad


def test_another_or_changed_model_forgets(model, calls, encode):
    kept = FrozenFeatures(2**20)
    kept.encode(model, ["a"], encode, dropout=0.0)
    model.bias.add_(1)
    kept.encode(model, ["a"], encode, dropout=0.0)
    kept.encode(nn.Linear(1, 4).requires_grad_(False), ["a"], encode, dropout=0.0)
    assert calls == [["a"]] * 3


def test_casts_of_the_model_are_noticed(model, calls, encode):
    kept = FrozenFeatures(2**20)
    kept.encode(model, ["a"], encode, dropout=0.0)
    model.bfloat16()
    kept.encode(model, ["a"], lambda keys: [torch.ones(4)], dropout=0.0)
    assert torch.equal(kept.encode(model, ["a"], encode, dropout=0.0)[0], torch.ones(4))


def test_another_device_is_noticed(model, calls, encode):
    kept = FrozenFeatures(2**20)
    kept.encode(model, ["a"], encode, dropout=0.0)
    model._hf_hook = SimpleNamespace(execution_device="cuda")  # as offloading to the CPU leaves it
    assert execution_device(model) == torch.device("cuda")
    moved = kept.encode(model, ["a"], lambda keys: [torch.ones(4)], dropout=0.0)
    assert torch.equal(moved[0], torch.ones(4))


def test_pairs_are_kept_with_the_bytes_of_both(model):
    kept, states = FrozenFeatures(2**20), torch.zeros(3, 4)
    pairs = kept.encode(model, ["a"], lambda keys: [(states[:2], states[2])], dropout=0.0)
    assert kept.num_bytes == 3 * 16
    assert sum(tensor.untyped_storage().nbytes() for tensor in pairs[0]) == 3 * 16
    assert kept.encode(model, ["a"], lambda keys: 1 / 0, dropout=0.0)[0] is pairs[0]


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_what_is_found_elsewhere_is_not_encoded(model, calls, encode, max_bytes):
    kept, asked = FrozenFeatures(max_bytes), []

    def look_up(key):
        asked.append(key)
        return torch.ones(4) if key == "a" else None

    for _ in range(2):
        found = kept.encode(model, ["a", "bb"], encode, dropout=0.0, look_up=look_up)
        assert torch.equal(found[0], torch.ones(4))
    kept_none = max_bytes == 0
    assert calls == [["bb"]] * (2 if kept_none else 1)
    assert asked == ["a", "bb"] * (2 if kept_none else 1)


def test_what_is_found_elsewhere_is_not_used_where_another_pass_would_differ(model, encode):
    model.requires_grad_(True)
    features = FrozenFeatures(0).encode(
        model, ["a"], encode, dropout=0.0, look_up=lambda key: pytest.fail("asked")
    )
    assert features[0].requires_grad
