"""Mixtures: weighted sums, each part reported, networks moved and kept in evaluation."""

import pytest
import torch
from torch import nn

from segalign.errors import ConfigError, DataError
from segalign.rewards.mixture import Mixture, MixturePart, RewardMixture, WeightedReward


def brightness(images, captions):
    return images.mean(dim=(1, 2, 3))


class Redness(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, images, captions):
        return self.scale * images[:, 0].mean(dim=(1, 2))


@pytest.fixture
def images():
    return torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_rewards_and_gradients_are_weighted(images):
    mixture = RewardMixture(
        {
            "red": WeightedReward(reward=Redness(), weight=0.5),
            "bright": WeightedReward(reward=brightness, weight=-3.0),
        }
    )
    images.requires_grad_(True)
    scores = mixture(images, ["a", "b", "c"])
    expected = images[:, 0].mean((1, 2)) - 3 * images.mean((1, 2, 3))
    torch.testing.assert_close(scores, expected)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), images)[0])
    each = mixture.score_each(images, ["a", "b", "c"])
    assert set(each) == {"red", "bright"}
    torch.testing.assert_close(each["bright"], images.mean((1, 2, 3)))


def test_networks_move_with_the_mixture():
    mixture = RewardMixture({"red": WeightedReward(reward=Redness())})
    assert mixture.double().networks["red"].scale.dtype == torch.float64


def test_mixtures_that_cannot_be_are_refused(images):
    with pytest.raises(ConfigError, match="expected at least one reward"):
        RewardMixture({})
    with pytest.raises(ConfigError, match="finite weight of the reward `red`; got nan"):
        RewardMixture({"red": WeightedReward(reward=brightness, weight=float("nan"))})
    mixture = RewardMixture({"all": WeightedReward(reward=lambda images, captions: images.mean())})
    with pytest.raises(DataError, match=r"expected 3 scores of the reward `all`; got shape \(\)"):
        mixture(images, ["a", "b", "c"])


class Bright:
    def load(self):
        return Redness()


def test_settings_make_a_mixture(images):
    settings = Mixture(parts={"a": MixturePart(reward=Bright(), weight=2.0)})
    mixture = settings.load()
    torch.testing.assert_close(mixture(images, "abc"), 4 * images[:, 0].mean((1, 2)))
    assert settings.load().networks["a"] is not mixture.networks["a"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least one reward"),
        ({"a.b": MixturePart(reward=Bright())}, "a name without dots .*; got `a.b`"),
        ({"a": MixturePart(reward=Bright(), weight=float("inf"))}, "finite weight .*; got inf"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(parts, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(parts=parts).load()


def test_a_part_must_be_wrapped():
    with pytest.raises(ConfigError, match=r"^expected a `MixturePart` or .* `a`; got `dict`; wrap"):
        Mixture(parts={"a": {"reward": None}}).load()
