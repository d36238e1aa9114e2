"""Guidance: weights, interval, rescaling, and settings that contradict each other."""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from segalign.diffusion.guidance import Guidance
from segalign.errors import ConfigError


@pytest.fixture
def outputs():
    return torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()


def test_weights_are_the_derivatives_of_the_guided_output(outputs):
    guidance = Guidance(scale=7.5)
    guided = guidance.combine(*outputs)
    conditional, unconditional = guidance.weights(500, 1000)
    assert (conditional, unconditional) == (7.5, -6.5)
    expected = conditional * outputs[0] + unconditional * outputs[1]
    assert torch.allclose(guided, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        ({}, {0, 199, 200, 500, 800, 801, 999}),
        ({"interval": (200, 800)}, {200, 500, 800}),
        ({"interval": (0.2, 0.801), "interval_unit": "fraction"}, {200, 500, 800}),
        ({"interval": (0.0, 1.0), "interval_unit": "fraction"}, {0, 199, 200, 500, 800, 801, 999}),
    ],
)
def test_the_second_pass_is_made_inside_the_interval_alone(settings, guided, outputs):
    guidance = Guidance(scale=3.0, **settings)
    calls = []

    def unconditional(latents, timestep):
        calls.append(timestep)
        return latents - 1

    denoise = guidance.denoiser(lambda latents, timestep: latents, unconditional, 1000)
    for timestep in (0, 199, 200, 500, 800, 801, 999):
        found = denoise(outputs[0], timestep)
        active = timestep in guided
        assert guidance.is_active(timestep, 1000) == active
        assert guidance.weights(timestep, 1000) == ((3.0, -2.0) if active else (1.0, 0.0))
        assert torch.allclose(found, outputs[0] + 2.0 * active)
    assert set(calls) == guided


def test_no_guidance_makes_no_second_pass(outputs):
    def fail(latents, timestep):
        raise AssertionError

    denoise = Guidance().denoiser(lambda latents, timestep: latents, fail, 1000)
    assert denoise(outputs, 999) is outputs


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_is_that_of_diffusers(share, outputs):
    conditional, unconditional = outputs
    plain = Guidance(scale=7.5).combine(conditional, unconditional)
    found = Guidance(scale=7.5, rescale=share).combine(conditional, unconditional)
    expected = rescale_noise_cfg(plain, conditional, guidance_rescale=share)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, plain, rtol=1e-2)


def test_rescaling_is_for_sampling_alone():
    Guidance(scale=7.5, interval=(0, 500)).require_linear()
    with pytest.raises(ConfigError, match=r"exact replay .*; got `rescale` 0\.7\. Set it to 0"):
        Guidance(scale=7.5, rescale=0.7).require_linear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": (0, 500)}, r"`interval` has no effect at `scale` 1; got \(0, 500\)"),
        ({"rescale": 0.7}, r"`rescale` has no effect at `scale` 1; got 0\.7"),
        ({"scale": -1.0}, r"`scale` must be at least 0; got -1\.0"),
        ({"scale": math.nan}, "`scale` must be at least 0; got nan"),
        ({"scale": 2.0, "rescale": 1.5}, r"`rescale` must be in \[0, 1\]; got 1\.5"),
        ({"scale": 2.0, "interval": (500, 200)}, r"low <= high; got \(500, 200\)"),
        (
            {"scale": 2.0, "interval": (0, 500), "interval_unit": "fraction"},
            r"low <= high <= 1; got \(0, 500\)",
        ),
        ({"scale": 2.0, "interval_unit": "sigma"}, "must be one of `timestep`, `fraction`"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Guidance(**settings)
    assert "\n" not in str(caught.value)
