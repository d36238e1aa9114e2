"""DDIM with noise, Euler and spacings, against diffusers and by the meaning of their numbers."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from toy_schedule import KINDS, SD, network, sampler_draws, schedule_of

from segalign.diffusion.linear_steps import Conversion, clean_step, ddim_step
from segalign.diffusion.sampler import DDIMSampler, EulerSampler
from segalign.diffusion.scheduler_sampler import change_sampler, make_sampler, sampler_name
from segalign.diffusion.spacing import spaced_timesteps
from segalign.errors import ConfigError


@pytest.fixture
def draws():
    return sampler_draws()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_with_noise_equals_diffusers(kind, spacing, eta, draws):
    schedule = schedule_of(kind)
    theirs = DDIMScheduler(
        **SD, prediction_type=kind, timestep_spacing=spacing, clip_sample=False,
        steps_offset=1 if spacing == "leading" else 0,
    )  # fmt: skip
    theirs.alphas_cumprod = schedule.alphas_cumprod
    theirs.set_timesteps(10)
    expected = draws[0]
    for step_noise, timestep in zip(draws[1:], theirs.timesteps, strict=True):
        output = network(expected, int(timestep))
        expected = theirs.step(
            output, timestep, expected, eta=eta, variance_noise=step_noise
        ).prev_sample
    sampler = DDIMSampler(num_inference_steps=10, spacing=spacing, eta=eta)
    for step_noise in (draws[1:], lambda step_index: draws[1 + step_index]):
        found = sampler.sample(network, draws[0], schedule, step_noise=step_noise)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_endless_eta_noises_the_prediction_anew(kind, draws):
    schedule = schedule_of(kind)
    sampler = DDIMSampler(num_inference_steps=4, eta=math.inf)
    expected = draws[0]
    for k, timestep in enumerate([999, 749, 499, 249]):
        step = clean_step(schedule, timestep)
        expected = step.a * expected + step.b * network(expected, timestep)
        if k < 3:
            level = torch.tensor([timestep - 250])
            expected = schedule.add_noise(expected, draws[1 + k], level)
    found = sampler.sample(network, draws[0], schedule, step_noise=draws[1:])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, math.inf])
def test_every_step_ends_at_the_noise_level_of_the_next(eta):
    schedule = schedule_of("epsilon")
    sampler = DDIMSampler(num_inference_steps=20, eta=eta)
    steps = sampler.steps(schedule)
    levels = [*schedule.alphas_cumprod[sampler.timesteps(1000)].tolist(), 1.0]
    for step, now, then in zip(steps, levels, levels[1:], strict=False):
        # Given the true noise, x' = sqrt(then) x_0 + ..., of variance 1 - then.
        assert step.a * math.sqrt(now) == pytest.approx(math.sqrt(then), rel=1e-12)
        from_noise = step.a * math.sqrt(1 - now) + step.b
        assert from_noise**2 + step.noise**2 == pytest.approx(1 - then, abs=1e-12)
    assert steps[-1].noise == 0


def test_noise_is_never_drawn_behind_the_callers_back(draws):
    sampler = DDIMSampler(num_inference_steps=3, eta=1.0)
    with pytest.raises(ConfigError, match=r"noise for every step .* `eta` > 0; got none"):
        sampler.sample(network, draws[0], schedule_of("epsilon"))
    before = torch.get_rng_state()
    sampler.sample(network, draws[0], schedule_of("epsilon"), step_noise=draws[1:])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spacing", "steps"), [("trailing", 10), ("leading", 10), ("linspace", 28)]
)
def test_euler_equals_diffusers(kind, spacing, steps, draws):
    schedule = schedule_of(kind)
    theirs = EulerDiscreteScheduler(
        **SD, prediction_type=kind, timestep_spacing=spacing,
        steps_offset=1 if spacing == "leading" else 0,
    )  # fmt: skip
    theirs.set_timesteps(steps)
    noise = draws[0].float()
    expected = noise * theirs.init_noise_sigma
    for timestep in theirs.timesteps:
        output = network(theirs.scale_model_input(expected, timestep), int(timestep))
        expected = theirs.step(output, timestep, expected).prev_sample
    sampler = EulerSampler(num_inference_steps=steps, spacing=spacing)
    assert sampler.timesteps(1000) == theirs.timesteps.tolist()
    found = sampler.sample(network, noise, schedule)
    # diffusers multiplies its table up in float32.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    unscaled = DDIMSampler(num_inference_steps=steps, spacing=spacing).sample(
        network, noise, schedule
    )
    assert torch.equal(unscaled, found) == (spacing == "leading")


def test_official_spacing_by_its_rule():
    assert spaced_timesteps("official", 50, 1000) == list(range(999, 18, -20))
    assert spaced_timesteps("official", 30, 1000) == list(range(989, 31, -33))
    assert spaced_timesteps("trailing", 30, 1000)[0] == 999


@pytest.mark.parametrize("steps", [2, 7, 10, 28, 50, 1000])
def test_linspace_is_that_of_diffusers(steps):
    theirs = DDIMScheduler(timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    assert spaced_timesteps("linspace", steps, 1000) == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "official"])
def test_one_step_starts_where_the_noise_is(spacing):
    (timestep,) = spaced_timesteps(spacing, 1, 1000)
    assert timestep == (1 if spacing == "leading" else 999)


@pytest.mark.parametrize(("kind", "timestep"), list(itertools.product(KINDS, [0, 19, 500, 999])))
def test_latents_come_back_from_clean_latents_and_noise(kind, timestep, draws):
    schedule = schedule_of(kind)
    squared = float(schedule.alphas_cumprod[timestep])
    latents, output = draws[0], draws[1]
    convert = Conversion.at(squared, kind)
    clean = convert.clean_latents * latents + convert.clean_output * output
    noise = convert.noise_latents * latents + convert.noise_output * output
    at = torch.tensor([timestep])
    # 1e-12 of the largest term: one over alpha, or sigma, is up to 34.
    assert torch.allclose(schedule.add_noise(clean, noise, at), latents, rtol=0, atol=1e-12)
    assert torch.allclose(schedule.training_target(clean, noise, at), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_pure_noise_at_the_start(kind, draws):
    schedule = schedule_of(kind, rescale_betas_zero_snr=True)
    steps = DDIMSampler(num_inference_steps=5).steps(schedule)
    # Nothing of pure noise is signal, so the first step keeps its direction alone.
    assert steps[0].carry == 0
    found = DDIMSampler(num_inference_steps=5).sample(network, draws[0], schedule)
    theirs = DDIMScheduler(
        **SD, prediction_type=kind, timestep_spacing="trailing", clip_sample=False
    )
    theirs.alphas_cumprod = schedule.alphas_cumprod
    theirs.set_timesteps(5)
    expected = draws[0]
    for timestep in theirs.timesteps:
        output = network(expected, int(timestep))
        expected = theirs.step(output, timestep, expected).prev_sample
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_steps_are_tabulated_beyond_the_latents_precision():
    step = ddim_step(999, 0.0047, 0.0058, "epsilon")
    assert step.a == pytest.approx(math.sqrt(0.0058 / 0.0047), rel=1e-15)
    assert step.carry == pytest.approx(step.a, rel=1e-15)


def test_euler_has_a_name_and_keeps_its_kind():
    sampler = make_sampler("euler", 7, 2.0, "leading")
    assert sampler == EulerSampler(num_inference_steps=7, guidance_scale=2.0, spacing="leading")
    assert sampler_name(sampler) == "euler"
    assert isinstance(change_sampler(sampler, num_inference_steps=3), EulerSampler)
    noisy = change_sampler(DDIMSampler(eta=0.5), guidance_scale=3.0)
    assert noisy == DDIMSampler(eta=0.5, guidance_scale=3.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": -0.1}, r"`eta` must be at least 0; got -0\.1"),
        ({"eta": math.nan}, "`eta` must be at least 0; got nan"),
        ({"spacing": "karras"}, "`spacing` must be one of `trailing`, .*; got 'karras'"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1; got 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        DDIMSampler(**settings)
