"""DDIM that clips, against diffusers and by the meaning of its settings."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from toy_schedule import KINDS, SD, network, sampler_draws, schedule_of

from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.impulse_response import impulse_response
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.scheduler_sampler import change_sampler
from segalign.errors import ConfigError


@pytest.fixture
def draws():
    return sampler_draws()


def by_diffusers(schedule, kind, draws, *, spacing, clip_range, eta, use_clipped=False, steps=10):
    scheduler = DDIMScheduler(
        **SD, prediction_type=kind, timestep_spacing=spacing,
        clip_sample=True, clip_sample_range=clip_range,
        steps_offset=1 if spacing == "leading" else 0,
    )  # fmt: skip
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(steps)
    latents = draws[0]
    for step_noise, timestep in zip(draws[1:], scheduler.timesteps, strict=False):
        latents = scheduler.step(
            network(latents, int(timestep)), timestep, latents, eta=eta,
            variance_noise=step_noise, use_clipped_model_output=use_clipped,
        ).prev_sample  # fmt: skip
    return latents


@pytest.mark.parametrize(
    ("kind", "spacing", "eta", "clip_range"),
    list(itertools.product(KINDS, ["trailing", "leading"], [0.0, 0.5, 1.0], [1.0, 0.4])),
)
def test_equals_diffusers_with_clip_sample(kind, spacing, eta, clip_range, draws):
    schedule = schedule_of(kind)
    sampler = ClippedSampler(
        num_inference_steps=10, spacing=spacing, eta=eta, clip_range=clip_range
    )
    settings = {"spacing": spacing, "clip_range": clip_range, "eta": eta}
    expected = by_diffusers(schedule, kind, draws, **settings)
    for step_noise in (draws[1:], lambda step_index: draws[1 + step_index]):
        found = sampler.sample(network, draws[0], schedule, step_noise=step_noise)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert found.abs().max() <= clip_range
    single = sampler.sample(network, draws[0].float(), schedule, step_noise=draws[1:].float())
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() < 1e-4  # rounding, amplified by 1 / alpha of up to 15
    # The noise is that of the output, not of the clipped clean latents.
    if kind != "sample" or eta < 1:
        others = by_diffusers(schedule, kind, draws, use_clipped=True, **settings)
        assert not torch.allclose(found, others, atol=1e-3)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_pure_noise_at_the_start(kind, draws):
    schedule = schedule_of(kind, rescale_betas_zero_snr=True)
    found = ClippedSampler(num_inference_steps=5).sample(network, draws[0], schedule)
    settings = {"spacing": "trailing", "clip_range": 1.0, "eta": 0.0, "steps": 5}
    expected = by_diffusers(schedule, kind, draws, **settings)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_single_step_ends_at_the_bound_itself(draws):
    sampler = ClippedSampler(num_inference_steps=1, clip_range=0.3)
    found = sampler.sample(network, draws[0].float(), schedule_of("epsilon"))
    assert found.abs().max() == torch.tensor(0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_endless_eta_noises_the_clipped_prediction_anew(kind, draws):
    schedule = schedule_of(kind)
    sampler = ClippedSampler(num_inference_steps=2, eta=math.inf)
    (clean,) = (sampler.clipped_steps(schedule)[0].convert,)
    output = network(draws[0], 999)
    first = (clean.clean_latents * draws[0] + clean.clean_output * output).clamp(-1, 1)
    seen = []
    sampler.sample(
        lambda latents, timestep: (seen.append(latents), network(latents, timestep))[1],
        draws[0],
        schedule,
        step_noise=draws[1:],
    )
    expected = schedule.add_noise(first, draws[1], torch.tensor([499]))
    assert torch.allclose(seen[1], expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_zero_where_it_clips_and_that_of_ddim_elsewhere(draws):
    schedule, clips = schedule_of("v_prediction"), ClippedSampler(num_inference_steps=1)
    gradients = []
    for sampler in (clips, DDIMSampler(num_inference_steps=1)):
        shift = torch.zeros_like(draws[0]).requires_grad_()
        clean = sampler.sample(
            lambda latents, t, shift=shift: network(latents, t) + shift,
            draws[0],
            schedule,
            enable_grad=True,
        )
        clean.sum().backward()
        gradients.append(shift.grad)
    inside = clean.abs() < 1
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(gradients[0], gradients[1] * inside)
    assert not clips.sample(network, draws[0], schedule).requires_grad


def test_noise_must_be_given(draws):
    sampler = ClippedSampler(num_inference_steps=3, eta=1.0)
    with pytest.raises(ConfigError, match=r"noise for every step .* `eta` > 0; got none"):
        sampler.sample(network, draws[0], schedule_of("epsilon"))


@pytest.mark.parametrize("table", ["steps", "path"])
def test_linear_tables_are_refused_and_the_graph_offered(table):
    sampler = ClippedSampler(clip_range=2.0)
    with pytest.raises(ConfigError, match=r"clips at 2\.0, .* \(`engine: graph`\)") as caught:
        getattr(sampler, table)(schedule_of("epsilon"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
def test_bounds_that_cannot_work(bound):
    with pytest.raises(ConfigError, match=f"`clip_range` must be above 0; got {bound}"):
        ClippedSampler(clip_range=bound)
    with pytest.raises(ConfigError, match="`eta` must be at least 0"):
        ClippedSampler(eta=-1.0)


def test_settings_change_and_it_still_clips():
    sampler = ClippedSampler(num_inference_steps=7, clip_range=0.5)
    expected = ClippedSampler(num_inference_steps=3, clip_range=0.5)
    assert change_sampler(sampler, num_inference_steps=3) == expected


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("clip_sample", r"`segalign\.diffusion\.clipped_sampler\.ClippedSampler` with the graph"),
        ("thresholding", "Set it to false, or choose another sampler"),
    ],
)
def test_schedulers_that_clip_are_told_what_can_serve(setting, advice):
    scheduler = DDIMScheduler(**SD, **{"clip_sample": False, setting: True})
    scheduler.set_timesteps(4)
    with pytest.raises(ConfigError, match=f"without `{setting}`, .*{advice}") as caught:
        impulse_response(scheduler, schedule_of("epsilon"))
    assert "\n" not in str(caught.value)
