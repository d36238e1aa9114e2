"""The two parts of a score, against the identities that define them."""

import pytest
import torch

from segalign.errors import ConfigError, DataError
from segalign.rewards.decomposition import (
    common_share,
    reweight,
    text_irrelevant,
    text_relevant,
    unit_mean,
)

B, E = 6, 16


@pytest.fixture
def cone():
    """Unit text features around a direction, the direction, and unit image features."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(E, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    text = direction + 0.5 * torch.randn(B, E, generator=generator, dtype=torch.float64)
    image = torch.randn(B, E, generator=generator, dtype=torch.float64)
    return text / text.norm(dim=1, keepdim=True), direction, image / image.norm(dim=1, keepdim=True)


def test_the_relevant_part_is_orthogonal_to_the_direction(cone):
    text, direction, _ = cone
    assert (text_relevant(text, direction) @ direction).abs().max() < 1e-15
    assert common_share(text, direction).min() > 0.1


def test_the_parts_sum_to_the_features(cone):
    text, direction, _ = cone
    parts = text_relevant(text, direction) + text_irrelevant(text, direction)
    torch.testing.assert_close(parts, text, rtol=0, atol=1e-15)


def test_omega_weighs_the_irrelevant_score_and_its_gradient(cone):
    text, direction, image = cone
    image.requires_grad_(True)

    def score(features):
        return (image * features).sum()

    relevant = score(text_relevant(text, direction))
    irrelevant = score(text_irrelevant(text, direction))
    reweighted = score(reweight(text, direction, 0.3))
    torch.testing.assert_close(reweighted, relevant + 0.3 * irrelevant)
    gradients = [torch.autograd.grad(s, image)[0] for s in (reweighted, relevant, irrelevant)]
    torch.testing.assert_close(gradients[0], gradients[1] + 0.3 * gradients[2])


def test_omega_one_keeps_and_zero_forgets_the_direction(cone):
    text, direction, _ = cone
    assert torch.equal(reweight(text, direction, 1.0), text)
    shifted = reweight(text + 3 * direction, direction, 0.0)
    torch.testing.assert_close(shifted, reweight(text, direction, 0.0))


@pytest.mark.parametrize("omega", [-0.1, 1.1, float("nan")])
def test_omega_outside_its_range_is_refused(cone, omega):
    with pytest.raises(ConfigError, match=r"expected `omega` in \[0, 1\]"):
        reweight(cone[0], cone[1], omega)


def test_the_direction_is_never_differentiated(cone):
    text, direction, _ = cone
    direction.requires_grad_(True)
    assert not reweight(text, direction, 0.3).requires_grad


def test_features_that_cancel_out_have_no_direction():
    features = torch.eye(3)
    with pytest.raises(DataError, match="those of 6 captions cancel out"):
        unit_mean(torch.cat([features, -features]).sum(0), 6)
    with pytest.raises(DataError, match="expected finite text features"):
        unit_mean(torch.tensor([1.0, float("nan")]), 1)
