"""Noise of later steps follows from the starting noise."""

import math

import torch

from segalign.diffusion.following_noise import following_noise

START = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_row_has_its_noise_in_any_batch_and_again():
    noise = following_noise(START)
    assert torch.equal(noise(3), following_noise(START.clone())(3))
    assert torch.equal(noise(3)[2:3], following_noise(START[2:3])(3))
    assert torch.equal(noise(0), noise(0))


def test_steps_rows_and_starts_differ():
    noise, other = following_noise(START), following_noise(START + 1e-6)
    draws = [noise(0), noise(1), other(0), START]
    for i, one in enumerate(draws):
        assert all(not torch.equal(one, two) for two in draws[i + 1 :])
    assert not torch.equal(noise(0)[0], noise(0)[1])


def test_it_is_standard_normal():
    rows = following_noise(torch.arange(64.0).reshape(64, 1, 1, 1).expand(64, 4, 8, 8))(0)
    assert abs(rows.mean().item()) < 4 / math.sqrt(rows.numel())
    assert abs(rows.std().item() - 1) < 4 / math.sqrt(2 * rows.numel())
