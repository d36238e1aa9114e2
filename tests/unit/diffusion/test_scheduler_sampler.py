"""Samplers of diffusers: equal to driving the scheduler by hand, and to ours where they agree."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import (
    SchedulerSampler,
    change_sampler,
    make_sampler,
    sampler_name,
)
from segalign.errors import ConfigError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = {
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpmpp": DPMSolverMultistepScheduler,
}
KINDS = ("epsilon", "v_prediction", "sample")


def toy_denoiser(latents, timestep):
    """A network that is neither linear in the latents nor independent of the timestep."""
    return torch.tanh(latents.roll(1, -1) * (1 + timestep / 1000)) + 0.1 * latents


@pytest.fixture
def noise():
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def by_hand(name, noise, kind, steps):
    """Drive a scheduler as the Stable Diffusion pipeline does."""
    scheduler = CLASSES[name](
        **SD, prediction_type=kind, timestep_spacing="leading", steps_offset=1,
        **({"clip_sample": False} if name == "ddim" else {}),
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        output = toy_denoiser(scaled, int(timestep))
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(CLASSES, KINDS)))
def test_equals_the_loop_of_a_pipeline(name, kind, noise):
    schedule = NoiseSchedule.from_config({**SD, "prediction_type": kind})
    sampler = SchedulerSampler(scheduler=name, num_inference_steps=8, spacing="leading")
    found = sampler.sample(toy_denoiser, noise, schedule)
    # diffusers multiplies its table up in float32.
    assert torch.allclose(found, by_hand(name, noise, kind, 8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "spacing", "steps"),
    [*itertools.product(KINDS, ["trailing", "leading"], [1, 10]), ("epsilon", "trailing", 25)],
)
def test_ddim_of_diffusers_equals_ours(kind, spacing, steps, noise):
    schedule = NoiseSchedule.from_config({**SD, "prediction_type": kind})
    settings = {"num_inference_steps": steps, "spacing": spacing}
    theirs = SchedulerSampler(scheduler="ddim", **settings)
    ours = DDIMSampler(**settings)
    noise = noise.double()
    found = theirs.sample(toy_denoiser, noise, schedule)
    expected = ours.sample(toy_denoiser, noise, schedule)
    # Both end at the predicted clean latents.
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["unipc", "dpmpp"])
def test_second_order_converges_faster_than_ddim(name, noise):
    schedule = NoiseSchedule.from_config(SD)
    smooth = lambda latents, timestep: 0.7 * latents / (1 + latents.square())  # noqa: E731
    noise = noise.double()
    exact = DDIMSampler(num_inference_steps=1000).sample(smooth, noise, schedule)
    errors = {
        each: (make_sampler(each, 20, 1.0).sample(smooth, noise, schedule) - exact).abs().max()
        for each in (name, "ddim")
    }
    assert errors[name] < errors["ddim"] / 2


@pytest.mark.parametrize("name", CLASSES)
def test_gradient_is_an_argument(name, noise):
    schedule = NoiseSchedule.from_config(SD)
    sampler = SchedulerSampler(scheduler=name, num_inference_steps=3)
    scale = torch.ones((), requires_grad=True)
    denoise = lambda latents, timestep: scale * toy_denoiser(latents, timestep)  # noqa: E731
    assert not sampler.sample(denoise, noise, schedule).requires_grad
    with torch.no_grad():
        recorded = sampler.sample(denoise, noise, schedule, enable_grad=True)
    recorded.sum().backward()
    assert scale.grad.abs() > 0


@pytest.mark.parametrize("steps", [1001, 61])
def test_steps_that_cannot_be_placed(steps, noise):
    sampler = SchedulerSampler(num_inference_steps=steps)
    with pytest.raises(ConfigError, match=f"1000 timesteps; got {steps}. Take one less"):
        sampler.sample(toy_denoiser, noise, NoiseSchedule.from_config(SD))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "euler"}, r"`scheduler` must be one of `ddim`, .*; got 'euler'"),
        ({"spacing": "karras"}, "`spacing` must be one of"),
        ({"num_inference_steps": 0}, "must be at least 1; got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerSampler(**settings)


@pytest.mark.parametrize("name", CLASSES)
def test_names_lead_to_samplers_and_back(name):
    sampler = make_sampler(name, 7, 2.5)
    assert (sampler.num_inference_steps, sampler.guidance_scale) == (7, 2.5)
    assert sampler_name(sampler) == name


def test_settings_change_one_by_one():
    sampler = DDIMSampler(num_inference_steps=7, guidance_scale=2.5, spacing="leading")
    assert change_sampler(sampler) == sampler
    assert change_sampler(sampler, "unipc", guidance_scale=1.0) == SchedulerSampler(
        scheduler="unipc", num_inference_steps=7, guidance_scale=1.0, spacing="leading"
    )
    fewer = change_sampler(SchedulerSampler(scheduler="ddim", spacing="linspace"), None, 3)
    assert fewer == SchedulerSampler(
        scheduler="ddim", num_inference_steps=3, spacing="linspace"
    )  # ours has no such spacing
