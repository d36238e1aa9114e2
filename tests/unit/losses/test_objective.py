"""The sum of losses: each from its own scores, with its own weight, in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from segalign.errors import ConfigError
from segalign.losses.contrastive import OwnedFeatures
from segalign.losses.objective import PreferenceFeatures, PreferenceObjective

SCALE = torch.tensor([math.log(4.0)], dtype=torch.float64)
PAIRED = ("pairwise", "segment_pairwise", "margin", "segment_margin")


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def pairs(**changes):
    """Caption 0 has two segments, caption 1 one; images lie on the axes of their features."""
    features = PreferenceFeatures(
        segments=OwnedFeatures(
            doubles((1, 0, 0), (0.6, 0.8, 0), (0, 0, 1)), torch.tensor([0, 0, 1])
        ),
        segment_texts=["a fox", "rain", "an owl"],
        mean=doubles((0.8, 0.4, 0), (0, 0, 1)),
        captions=["A fox. Rain.", "An owl."],
        images=doubles((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0.6, 0.8)),
        preference_probs=doubles((1, 0), (0.25, 0.75)),
        valid=torch.tensor([True, True]),
    )
    return replace(features, **changes)


def singles(**changes):
    return pairs(images=pairs().images[[0, 2]], preference_probs=None, **changes)


def losses(features, **weights):
    return PreferenceObjective(**weights).losses(features, SCALE)


def entropy(*probs):
    return -sum(p * math.log(p) for p in probs if p)


def softplus(x):
    return math.log1p(math.exp(x))


# KL of (0.25, 0.75) from a pair of scores 1 and 0.8, times 4.
SECOND = 0.25 * softplus(-0.8) + 0.75 * softplus(0.8) - entropy(0.25, 0.75)
CLOSED_FORMS = {
    "pairwise": [softplus(4 * (0.4 - 0.8)), SECOND],
    "segment_pairwise": [(softplus(-4) + softplus(4 * 0.2)) / 2, SECOND],
    "margin": [0.1, 0.5 * 0.7],
    "segment_margin": [(0 + 0.7) / 2, 0.5 * 0.7],
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_losses_of_pairs_in_closed_form(name):
    found = losses(pairs(), **{name: 1.0}, margin_width=0.5)
    assert found.keys() == {name}
    torch.testing.assert_close(found[name], doubles(*CLOSED_FORMS[name]))


def contrast(own, to_images, to_texts):
    return (softplus_of(own, to_images) + softplus_of(own, to_texts)) / 2


def softplus_of(own, rivals):
    return math.log1p(sum(math.exp(4 * (rival - own)) for rival in rivals))


def test_contrast_by_captions_and_by_segments_in_closed_form():
    found = losses(singles(), contrastive=1, segment_contrastive=1)
    # Images are (1, 0, 0) and (0, 0, 1): no text of one caption scores with the other's.
    whole = [contrast(0.8, [0], [0]), contrast(1, [0], [0])]
    torch.testing.assert_close(found["contrastive"], doubles(*whole))
    fox, rain = contrast(1, [0], [0]), contrast(0.6, [0], [0])
    by_segment = [(fox + rain) / 2, contrast(1, [0], [0, 0])]
    torch.testing.assert_close(found["segment_contrastive"], doubles(*by_segment))


def test_captions_and_segments_repeat_apart():
    """A segment of two captions is no negative of either; captions are told by their own texts."""
    features = singles(segment_texts=["a fox", "rain", "rain"])
    found = losses(features, contrastive=1, segment_contrastive=1)
    fox = contrast(1, [0], [])  # all of the other caption's texts fall in this one too
    torch.testing.assert_close(found["segment_contrastive"][0], doubles((fox + 0) / 2)[0])
    assert found["contrastive"].equal(losses(singles(), contrastive=1)["contrastive"])
    same = losses(singles(captions=["A fox.", "A fox."]), contrastive=1)["contrastive"]
    assert same.tolist() == [0, 0]


def test_contrast_of_pairs_is_weighed_by_preference():
    features = pairs()
    found = losses(features, contrastive=1)["contrastive"]
    first = contrast(0.8, [0, 0.24], [0])  # the second image of caption 0 weighs nothing
    own = (contrast(1, [0, 0], [0]), contrast(0.8, [0, 0], [0.24]))
    torch.testing.assert_close(found, doubles(first, 0.25 * own[0] + 0.75 * own[1]))


def test_a_whole_caption_is_its_only_segment():
    whole = pairs(
        segments=OwnedFeatures(pairs().mean, torch.arange(2)), segment_texts=pairs().captions
    )
    for name in ("pairwise", "margin", "contrastive"):
        other = "segment_" + name
        found = losses(whole, **{name: 1.0, other: 1.0})
        torch.testing.assert_close(found[name], found[other])


def test_the_total_is_the_weighted_sum():
    weights = dict(zip((*PAIRED, "contrastive", "segment_contrastive"), range(1, 7), strict=True))
    objective = PreferenceObjective(**weights)
    found = objective.losses(pairs(), SCALE)
    assert found.keys() == weights.keys()
    expected = sum(weight * found[name] for name, weight in weights.items())
    torch.testing.assert_close(objective.total(found), expected)


def test_pair_weights_are_of_losses_on_pairs_alone():
    features, weights = pairs(), doubles(0.5, 3)
    names = dict.fromkeys((*PAIRED, "contrastive", "segment_contrastive"), 1.0)
    plain = losses(features, **names)
    weighed = losses(replace(features, pair_weights=weights), **names)
    for name, values in plain.items():
        expected = weights * values if name in PAIRED else values
        torch.testing.assert_close(weighed[name], expected)


def test_invalid_captions_cost_nothing():
    features = pairs(valid=torch.tensor([True, False]))
    names = dict.fromkeys((*PAIRED, "contrastive", "segment_contrastive"), 1.0)
    found = losses(features, **names, margin_width=0.5)
    assert all(values[1] == 0 for values in found.values())
    for name in PAIRED:
        torch.testing.assert_close(found[name][0].item(), CLOSED_FORMS[name][0])
    assert found["contrastive"][0] == 0  # the other caption is no negative either


def test_gradients_reach_all_features_and_the_temperature():
    unit = {
        "mean": F.normalize(pairs().mean, dim=-1).requires_grad_(True),
        "images": pairs().images.requires_grad_(True),
    }
    segments = pairs().segments.features.requires_grad_(True)
    features = pairs(segments=OwnedFeatures(segments, pairs().segments.owner), **unit)
    scale = SCALE.clone().requires_grad_(True)
    objective = PreferenceObjective(pairwise=1, segment_contrastive=1)
    objective.total(objective.losses(features, scale)).sum().backward()
    assert all(leaf.grad.any() for leaf in (*unit.values(), segments, scale))


def test_only_hinges_do_without_a_temperature():
    assert not PreferenceObjective(margin=1, segment_margin=1).needs_logit_scale()
    for name in ("pairwise", "segment_pairwise", "contrastive", "segment_contrastive"):
        assert PreferenceObjective(margin=1, **{name: 1.0}).needs_logit_scale()


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["pairwise", "segment_contrastive", "margin_width"])
def test_weights_are_finite_and_not_negative(name, weight):
    message = rf"^expected `objective.{name}` of at least 0; got {weight}; change it$"
    with pytest.raises(ConfigError, match=message):
        PreferenceObjective(**{"contrastive": 1.0, name: weight})


def test_an_objective_has_a_loss():
    message = (
        r"^expected a positive weight of at least one loss of `objective`; got none; set one of "
        r"pairwise, segment_pairwise, margin, segment_margin, contrastive, segment_contrastive$"
    )
    with pytest.raises(ConfigError, match=message):
        PreferenceObjective(margin_width=0.3)


@pytest.mark.parametrize("name", PAIRED)
def test_single_images_have_no_preference(name):
    message = (
        rf"^expected preference pairs for `objective` \({name}\); got single images; set "
        r"`data\.content: preference`, or the weights of these losses to 0$"
    )
    with pytest.raises(ConfigError, match=message):
        losses(singles(), **{name: 1.0, "contrastive": 1.0})
