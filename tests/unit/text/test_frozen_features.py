import pytest
import torch
from torch import nn

from segalign.text.frozen_features import FrozenFeatures


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
