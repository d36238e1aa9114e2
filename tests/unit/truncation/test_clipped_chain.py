"""Gradients through a sampler that clips, against the run written out plainly in float64."""

import pytest
import torch
from toy_rollout import BATCH, Toy, largest_difference

from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import ConfigError
from segalign.truncation.chain import Chain
from segalign.truncation.draft import DRaFT, DRaFTLV, FullBackpropagation
from segalign.truncation.drtune import DRTune
from segalign.truncation.graph import GraphEngine
from segalign.truncation.refl import ReFL
from segalign.truncation.replay import ReplayEngine

EXACT = 1e-10
BOUND = 0.4
KINDS = ["epsilon", "v_prediction", "sample"]


def plain_gradients(toy, chain, timesteps, eta):
    """Write the clipped run out and differentiate it.

    Returns:
        Gradients, clean latents, and the share of values that are clipped in all steps.
    """
    plan, schedule = chain.plan, toy.schedule
    levels = [float(schedule.alphas_cumprod[t]) for t in timesteps] + [1.0]
    toy.net.zero_grad()
    latents, clipped = toy.noise.initial(), []
    for index, timestep in enumerate(timesteps):
        now, then = levels[index], levels[index + 1]
        alpha, sigma = now**0.5, (1 - now) ** 0.5
        seen = latents.detach() if plan.detach_input else latents
        with torch.set_grad_enabled(index in plan.train_steps):
            eps = toy._predicted_noise(seen, timestep, alpha, sigma)
        clean = ((latents - sigma * eps) / alpha).clamp(-BOUND, BOUND)
        clipped.append((clean.abs() == BOUND).double().mean().item())
        if index == plan.last_step:
            break
        injected = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        latents = then**0.5 * clean + (1 - then - injected**2) ** 0.5 * eps
        latents = latents + injected * toy.noise.of_step(index)
    images = [clean]
    for copy_index in range(plan.num_renoised):
        copy = alpha * clean.detach() + sigma * toy.noise.of_copy(copy_index)
        eps = toy._predicted_noise(copy, timestep, alpha, sigma)
        images.append(((copy - sigma * eps) / alpha).clamp(-BOUND, BOUND))
    sum(toy.loss(image, torch.arange(BATCH)).sum() for image in images).backward()
    return toy.gradients(), clean.detach(), sum(clipped) / len(clipped)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "strategy",
    [
        DRTune(num_train_steps=3),
        DRTune(num_train_steps=2, early_stop=2),
        ReFL(first_step=2, last_step=4),
        DRaFT(num_train_steps=3),
        DRaFTLV(),
        FullBackpropagation(),
    ],
    ids=repr,
)
def test_the_graph_is_the_plain_clipped_run(strategy, kind, eta):
    toy = Toy(kind)
    sampler = ClippedSampler(num_inference_steps=6, eta=eta, clip_range=BOUND)
    for step in range(2):
        chain = toy.chain(strategy, sampler, step=step)
        plain, clean, share = plain_gradients(toy, chain, sampler.timesteps(1000), eta)
        # Some values are clipped, some are not, or nothing would be tested.
        assert 0.1 < share < 0.95
        for checkpoint in (False, True):
            found, report = toy.run(GraphEngine(checkpoint=checkpoint), chain)
            assert largest_difference(found, plain) < EXACT
            torch.testing.assert_close(report.latents, clean, rtol=1e-12, atol=1e-12)
            assert report.factors == {}


@pytest.mark.parametrize(
    ("kind", "zero_snr"),
    [*((kind, False) for kind in KINDS), ("v_prediction", True), ("sample", True)],
)
def test_far_bounds_leave_the_linear_gradients(kind, zero_snr):
    toy = Toy(kind, zero_snr=zero_snr)
    for strategy in (DRTune(num_train_steps=5), FullBackpropagation()):
        linear = toy.chain(strategy, DDIMSampler(num_inference_steps=5, eta=0.3))
        clipped = toy.chain(
            strategy, ClippedSampler(num_inference_steps=5, eta=0.3, clip_range=1e9)
        )
        expected, _ = toy.run(GraphEngine(), linear)
        found, _ = toy.run(GraphEngine(), clipped)
        assert largest_difference(found, expected) < EXACT


def test_nothing_passes_where_everything_is_clipped():
    toy = Toy()
    sampler = ClippedSampler(num_inference_steps=3, clip_range=1e-9)
    found, _ = toy.run(GraphEngine(), toy.chain(DRaFT(), sampler))
    assert not any(gradient.any() for gradient in found.values())


@pytest.fixture
def chain():
    return Toy().chain(DRTune(num_train_steps=2), ClippedSampler(num_inference_steps=4))


def test_replay_refuses_a_clipped_run_and_offers_the_graph(chain):
    with pytest.raises(ConfigError, match=r"got one that clips\. .*graph\.GraphEngine") as caught:
        Toy().run(ReplayEngine(), chain)
    assert "\n" not in str(caught.value)


def test_a_clipped_run_has_no_linear_map(chain):
    with pytest.raises(ConfigError, match="got one that clips"):
        _ = chain.factors
    assert chain.weight == chain.image_weight == 1


def test_a_clipped_run_is_not_normalised():
    plan = DRTune(num_train_steps=2, normalize=True).plan(4, 0, 0)
    sampler = ClippedSampler(num_inference_steps=4)
    with pytest.raises(ConfigError, match=r"no `normalize` with a sampler that clips.* got true"):
        Chain.of(sampler, Toy().schedule, plan)
    with pytest.raises(ConfigError, match="a sampler of 4 steps, as the plan has; got 3"):
        Chain.of(ClippedSampler(num_inference_steps=3), Toy().schedule, plan)


def test_clipped_steps_are_not_taken_for_linear_ones():
    schedule, plan = Toy().schedule, DRTune(num_train_steps=2).plan(4, 0, 0)
    steps = ClippedSampler(num_inference_steps=4).clipped_steps(schedule)
    with pytest.raises(ConfigError, match=r"got `ClippedStep`.* one that clips, `ClippedSampler`"):
        Chain.from_steps(steps, schedule, plan)
