"""Linear paths: recursions and schedulers through one interface, and their gradients."""

import itertools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from segalign.diffusion.impulse_response import impulse_response
from segalign.diffusion.linear_path import LinearPath
from segalign.diffusion.linear_steps import Conversion, LinearStep
from segalign.diffusion.sampler import DDIMSampler, EulerSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import SchedulerSampler
from segalign.errors import ConfigError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample")
STEPS = 5


def schedule_of(kind, **special):
    return NoiseSchedule.from_config({**SD, "prediction_type": kind, **special})


def samplers():
    few = {"num_inference_steps": STEPS}
    return {
        "ddim": DDIMSampler(**few),
        "ddim noise": DDIMSampler(**few, eta=0.7),
        "ddim new noise": DDIMSampler(**few, eta=math.inf),
        "ddim linspace": DDIMSampler(**few, spacing="linspace"),
        "euler": EulerSampler(**few),
        "diffusers ddim": SchedulerSampler(scheduler="ddim", **few),
        "dpmpp": SchedulerSampler(scheduler="dpmpp", **few),
        "dpmpp linspace": SchedulerSampler(scheduler="dpmpp", spacing="linspace", **few),
        "unipc": SchedulerSampler(scheduler="unipc", **few),
    }


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1 + STEPS, 2, 3, generator=generator, dtype=torch.float64)


def network(latents, timestep, weight=1.0):
    return torch.tanh(weight * latents.roll(1, -1) * (1 + timestep / 1000)) + 0.1 * latents


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(samplers(), KINDS)))
def test_the_path_samples_as_the_sampler(name, kind, draws):
    sampler, schedule = samplers()[name], schedule_of(kind)
    extra = {"step_noise": draws[1:]} if "noise" in name else {}
    found = sampler.path(schedule).sample(network, draws[0], **extra)
    expected = sampler.sample(network, draws[0], schedule, **extra)
    # The multistep schedulers keep their own tables in float32.
    tolerance = 1e-6 if name.startswith(("dpmpp", "unipc")) else 1e-13
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_recursions_equal_their_impulse_response(kind, spacing):
    schedule = schedule_of(kind)
    offset = 1 if spacing == "leading" else 0
    settings = {**SD, "timestep_spacing": spacing, "steps_offset": offset, "prediction_type": kind}
    pairs = [
        (DDIMSampler, DDIMScheduler(**settings, clip_sample=False)),
        (EulerSampler, EulerDiscreteScheduler(**settings)),
    ]
    for ours, theirs in pairs:
        theirs.set_timesteps(10)
        recursion = ours(num_inference_steps=10, spacing=spacing).path(schedule)
        response = impulse_response(theirs, schedule)
        assert recursion.timesteps == response.timesteps
        # diffusers' scale of the noise that Euler starts from is in float32.
        tolerance = 1e-12 if ours is DDIMSampler else 1e-5
        for table in ("noise_coefficients", "output_coefficients", "gradient_coefficients"):
            found, expected = getattr(response, table), getattr(recursion, table)
            bound = 1e-12 if table != "noise_coefficients" else tolerance
            assert torch.allclose(found, expected, rtol=bound, atol=1e-12), table


def test_dpm_solver_2m_by_its_formula():
    """x' = (sigma'/sigma) x - alpha' (e^-h - 1) ((1 + 1/2r) x0 - (1/2r) x0_before)."""
    schedule = schedule_of("epsilon")
    path = SchedulerSampler(scheduler="dpmpp", num_inference_steps=STEPS).path(schedule)
    level = schedule.alphas_cumprod[list(path.timesteps)].tolist()
    alpha, sigma = [math.sqrt(a) for a in level], [math.sqrt(1 - a) for a in level]
    log_ratio = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    unit = torch.eye(1 + STEPS, dtype=torch.float64)
    latents, clean = unit[0], []
    for k in range(STEPS):
        found = torch.cat([path.noise_coefficients[k : k + 1], path.output_coefficients[k]])
        assert torch.allclose(found, latents, rtol=1e-12, atol=1e-12)
        clean.append((latents - sigma[k] * unit[k + 1]) / alpha[k])
        if k == STEPS - 1:
            latents = clean[k]
            break
        h = log_ratio[k + 1] - log_ratio[k]
        mixed = clean[k]
        if k > 0:
            r = (log_ratio[k] - log_ratio[k - 1]) / h
            mixed = (1 + 1 / (2 * r)) * clean[k] - clean[k - 1] / (2 * r)
        latents = sigma[k + 1] / sigma[k] * latents - alpha[k + 1] * math.expm1(-h) * mixed
    assert torch.allclose(path.gradient_factors, latents[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "unipc"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_response_of_outputs_is_that_of_the_scheduler_itself(name, kind):
    """Not by way of predicted noise, but with the scheduler's own conversion."""
    schedule = schedule_of(kind)
    sampler = SchedulerSampler(scheduler=name, num_inference_steps=STEPS)
    scheduler = sampler.build(schedule)
    unit = torch.eye(1 + STEPS, dtype=torch.float64)
    latents = unit[:, :1]
    for k, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(unit[:, k + 1 : k + 2], timestep, latents).prev_sample
    path = sampler.path(schedule)
    found = torch.cat([path.noise_coefficients[-1:], path.output_coefficients[-1]])
    assert torch.allclose(found, latents.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(samplers(), KINDS)))
def test_gradient_factors_are_those_of_autograd(name, kind, draws):
    """Replay (one backward per step, cotangent c_t g) against the recursion with sg(x_t)."""
    sampler, schedule = samplers()[name], schedule_of(kind)
    path = sampler.path(schedule)
    weight = torch.full((), 0.8, dtype=torch.float64, requires_grad=True)
    outputs = [network(draws[0], t, weight) for t in path.timesteps]
    replay = [torch.autograd.grad((c * o).sum(), weight, retain_graph=True)[0]
              for c, o in zip(path.gradient_factors, outputs, strict=True)]  # fmt: skip
    if isinstance(sampler, SchedulerSampler):
        predicts_noise = SchedulerSampler(
            scheduler=sampler.scheduler, num_inference_steps=STEPS, spacing=sampler.spacing
        )
        scheduler = predicts_noise.build(schedule_of("epsilon"))
        latents = draws[0]
        for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
            level = float(schedule.alphas_cumprod[timestep])
            convert = Conversion.at(level, kind)
            noise = convert.noise_latents * latents.detach() + convert.noise_output * output
            latents = scheduler.step(noise, timestep, latents).prev_sample
    else:
        latents = sampler.initial_scale(schedule) * draws[0]
        for step, output in zip(sampler.steps(schedule), outputs, strict=True):
            fixed = (step.a - step.carried) * latents.detach()
            latents = step.carried * latents + fixed + step.b * output
    expected = torch.autograd.grad(latents.sum(), weight)[0]
    tolerance = 1e-6 if isinstance(sampler, SchedulerSampler) else 1e-12
    assert sum(replay) == pytest.approx(expected.item(), rel=tolerance)
    assert all(abs(each) > 0 for each in replay)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_factors_in_closed_form(kind, eta):
    schedule = schedule_of(kind)
    sampler = DDIMSampler(num_inference_steps=20, eta=eta)
    steps, path = sampler.steps(schedule), sampler.path(schedule)
    level = torch.tensor([*schedule.alphas_cumprod[list(path.timesteps)], 1.0]).double()
    alpha, ratio = level.sqrt()[:-1], ((1 - level) / level).sqrt()[:-1]
    injected = torch.tensor([step.noise for step in steps], dtype=torch.float64)
    rest = (1 - level[1:] - injected**2) * (eta < math.inf)  # all is new noise, but for rounding
    after = (rest.clamp(min=0) / level[1:]).sqrt()
    expected = {
        "epsilon": after - ratio,
        "v_prediction": alpha * (after - ratio),
        "sample": 1 - after / ratio,
    }[kind]
    assert torch.allclose(path.gradient_factors, expected, rtol=1e-10, atol=1e-12)
    assert (path.gradient_factors.abs() > 1e-3).all()


def test_the_factors_of_sd15_are_those_on_record():
    """papers.md 8b: 50 official steps of SD-1.5."""
    sampler = DDIMSampler(num_inference_steps=50, spacing="official")
    factors = -sampler.path(schedule_of("epsilon")).gradient_factors
    listed = [1.648, 1.424, 1.233, 1.072, 0.935, 0.817, 0.717, 0.631, 0.557, 0.493]
    assert factors[:10].tolist() == pytest.approx(listed, abs=5e-4)
    by_timestep = dict(zip(sampler.timesteps(1000), factors.tolist(), strict=True))
    for timestep, value in {519: 0.112, 139: 0.045, 119: 0.045, 39: 0.062, 19: 0.134}.items():
        assert by_timestep[timestep] == pytest.approx(value, abs=5e-4)
    assert factors.sum().item() == pytest.approx(14.61, abs=5e-3)
    sums = [factors[offset::10].sum().item() for offset in range(10)]
    assert sums == pytest.approx(
        [2.36, 2.07, 1.82, 1.61, 1.43, 1.28, 1.14, 1.03, 0.94, 0.93], abs=5e-3
    )


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(samplers(), KINDS)))
def test_an_early_stop_ends_at_the_predicted_clean_latents(name, kind, draws):
    schedule = schedule_of(kind)
    path = samplers()[name].path(schedule)
    extra = {"step_noise": draws[1:]}
    stopped = path.stop_at(3, schedule)
    assert stopped.timesteps == path.timesteps[:4]
    outputs = list(draws[1:])
    latents = path.latents(3, draws[0], outputs, **extra)
    level = schedule.alphas_cumprod[path.timesteps[3]]
    convert = Conversion.at(float(level), kind)
    expected = convert.clean_latents * latents + convert.clean_output * outputs[3]
    found = stopped.latents(4, draws[0], outputs, **extra)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    # A gradient of earlier outputs passes through the latents alone: x_0 = (x - sigma eps) / alpha.
    earlier = path.gradient_coefficients[3, :3] / level.sqrt()
    assert torch.allclose(stopped.gradient_factors[:3], earlier, rtol=1e-12, atol=1e-12)
    assert stopped.gradient_factors[3].item() == pytest.approx(
        -float(((1 - level) / level).sqrt()) * convert.noise_output, rel=1e-12
    )
    whole = path.stop_at(STEPS - 1, schedule)
    assert torch.allclose(whole.output_coefficients, path.output_coefficients, atol=1e-12)
    assert torch.allclose(whole.gradient_factors, path.gradient_factors, atol=1e-12)
    with pytest.raises(IndexError):
        path.stop_at(STEPS, schedule)


def test_steps_made_by_hand():
    path = LinearPath.from_steps([LinearStep(9, 2.0, 3.0), LinearStep(4, 5.0, 7.0, 0.5)], 0.5)
    assert path.timesteps == (9, 4)
    assert path.noise_coefficients.tolist() == [0.5, 1, 5]
    assert path.output_coefficients.tolist() == [[0, 0], [3, 0], [15, 7]]
    assert path.injected_coefficients.tolist() == [[0, 0], [0, 0], [0, 0.5]]
    assert path.gradient_factors.tolist() == [15, 7]


@pytest.mark.parametrize("name", ["ddim", "unipc"])
def test_float32_latents_keep_their_precision(name, draws):
    """Terms of 14 times the noise cancel; summed in float32 they leave an error of 1e-6."""
    schedule = schedule_of("epsilon")
    path = SchedulerSampler(scheduler=name, num_inference_steps=50).path(schedule)

    def near_oracle(latents, timestep):
        """Noise of given clean latents, but for a part that depends on the latents."""
        alpha, sigma = schedule.levels(torch.tensor([timestep]), latents)
        noise = (latents - alpha * draws[1].to(latents)) / sigma
        return noise * (1 + 0.05 * torch.tanh(latents.roll(1, -1)))

    exact = path.sample(near_oracle, draws[0])
    found = path.sample(near_oracle, draws[0].float())
    assert (found - exact).norm() <= 2e-7 * exact.norm()


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["unipc", "dpmpp"])
def test_schedulers_bear_zero_terminal_snr(name, kind, draws):
    schedule = schedule_of(kind, rescale_betas_zero_snr=True)
    sampler = SchedulerSampler(scheduler=name, num_inference_steps=STEPS)
    kinds = {"unipc": UniPCMultistepScheduler, "dpmpp": DPMSolverMultistepScheduler}
    theirs = kinds[name](
        **SD, prediction_type=kind, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    theirs.set_timesteps(STEPS)
    expected = draws[0].float()
    for timestep in theirs.timesteps:
        output = network(expected, int(timestep))
        expected = theirs.step(output, timestep, expected).prev_sample
    sampled = sampler.sample(network, draws[0].float(), schedule)
    assert torch.allclose(sampled, expected, rtol=1e-3, atol=1e-3)
    by_path = sampler.path(schedule).sample(network, draws[0])
    assert torch.allclose(by_path.float(), sampled, rtol=1e-3, atol=1e-3)


def test_the_scheduler_is_left_as_it_was():
    scheduler = UniPCMultistepScheduler(**SD, prediction_type="v_prediction")
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.clone()
    impulse_response(scheduler, schedule_of("v_prediction"))
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.step_index is None
    assert torch.equal(scheduler.sigmas, sigmas)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DDIMScheduler, {}, "without `clip_sample`, which is not linear .*; got True"),
        (DDIMScheduler, {"clip_sample": False, "thresholding": True}, "without `thresholding`"),
        (UniPCMultistepScheduler, {"thresholding": True}, "without `thresholding`"),
        (
            DPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++"},
            "without noise of its own; got `sde-dpmsolver",
        ),
        (
            UniPCMultistepScheduler,
            {"use_karras_sigmas": True},
            "with the noise levels of the model",
        ),
        (
            EulerDiscreteScheduler,
            {"timestep_spacing": "linspace"},
            "at whole timesteps; got others",
        ),
        (UniPCMultistepScheduler, {"beta_end": 0.02}, "with the noise levels of the model"),
        (DDIMScheduler, {"clip_sample": False, "beta_end": 0.02}, "with the noise levels"),
        (DDPMScheduler, {}, r"linear in its outputs \(`DDIM.*; got `DDPMScheduler`"),
    ],
)
def test_schedulers_that_are_not_linear_are_refused(kind, settings, message):
    scheduler = kind(**{**SD, **settings})
    scheduler.set_timesteps(8)
    with pytest.raises(ConfigError, match=message) as caught:
        impulse_response(scheduler, schedule_of("epsilon"))
    assert "\n" not in str(caught.value)


def test_official_spacing_is_our_samplers_alone():
    with pytest.raises(ConfigError, match="that `unipc` of diffusers has; got `official`"):
        SchedulerSampler(spacing="official")
