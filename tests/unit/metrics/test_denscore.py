"""Denscore-O in closed form, and the direction that it takes from captions."""

import math

import pytest
import torch

from segalign.metrics.denscore import denscore_o, mean_direction


def test_the_common_part_does_not_count():
    direction = torch.tensor([1.0, 0, 0])
    texts = torch.tensor([[0.9, 0.1, 0], [0.2, 0.5, 0], [0.7, 0, 0]])
    images = torch.tensor([[0.6, 0.8, 0.0], [0.6, 0.0, 0.8], [1.0, 0, 0]])
    found = denscore_o(images, texts, direction)
    assert found.dtype == torch.float64
    assert found[:2].tolist() == pytest.approx([80, 0], abs=1e-5)
    assert math.isnan(found[2])  # nothing but V


def test_the_length_of_a_caption_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.nn.functional.normalize(torch.randn(9, 6, generator=generator), dim=-1)
    one = denscore_o(drawn[:4], drawn[4:8], drawn[8])
    half = denscore_o(drawn[:4], drawn[4:8] / 2, drawn[8])
    assert one.tolist() == pytest.approx(half.tolist())
    assert (one.abs() <= 100).all()


def test_the_mean_direction_knows_no_order():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.rand(500, 32, generator=generator), dim=-1)
    found = mean_direction(features)
    assert torch.equal(found, mean_direction(features[torch.randperm(500)]))
    assert found.norm().item() == pytest.approx(1, abs=1e-12)
    assert (found @ features.double().mean(0)).item() == pytest.approx(
        features.double().mean(0).norm().item(), rel=1e-9
    )
