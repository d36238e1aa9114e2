"""Truncated gradients: two engines against each other and against the run written out plainly.

Float64 throughout. The engines and the plain run do the same sums in other orders, so they agree
to 1e-10 relative per weight with orders of magnitude to spare.
"""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from toy_rollout import BATCH, STABLE_DIFFUSION, Toy, largest_difference

from segalign.diffusion.sampler import DDIMSampler, EulerSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import SchedulerSampler
from segalign.truncation.alignprop import AlignProp
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser
from segalign.truncation.draft import DRaFT, DRaFTLV, FullBackpropagation
from segalign.truncation.drtune import DRTune, LongAlign
from segalign.truncation.graph import GraphEngine
from segalign.truncation.plan import TruncationPlan
from segalign.truncation.refl import ReFL
from segalign.truncation.replay import ReplayEngine
from segalign.truncation.step_norms import StepGradientNorms

pytestmark = pytest.mark.numerics

EXACT = 1e-10
KINDS = ["epsilon", "v_prediction", "sample"]
DETACHED = [
    DRTune(num_train_steps=1),
    DRTune(num_train_steps=3),
    DRTune(num_train_steps=4, normalize=True),
    DRTune(num_train_steps=3, early_stop=5),
    DRTune(num_train_steps=10),
    LongAlign(),
    ReFL(first_step=4, last_step=9),
    DRaFT(),
]


class Chosen:
    """A strategy that trains given steps."""

    def __init__(self, *train_steps, last_step=None, detach_input=True, **settings):
        self.settings = {
            "train_steps": train_steps,
            "last_step": last_step,
            "detach_input": detach_input,
            **settings,
        }

    def plan(self, num_steps, seed, step):
        settings = dict(self.settings)
        if settings["last_step"] is None:
            settings["last_step"] = num_steps - 1
        return TruncationPlan(num_steps=num_steps, **settings)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", DETACHED, ids=repr)
def test_replay_is_the_graph_is_the_plain_run(strategy, kind, eta):
    """For offsets of several optimizer steps, K dividing N = 10 or not, guidance 3."""
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=10, eta=eta)
    for step in range(2):
        chain = toy.chain(strategy, sampler, step=step)
        replayed, report = toy.run(ReplayEngine(), chain)
        recorded, expected_report = toy.run(GraphEngine(), chain)
        plain = toy.plain_gradients(chain.plan, sampler.timesteps(1000), eta)
        plain = {name: gradient * chain.weight for name, gradient in plain.items()}
        assert largest_difference(recorded, plain) < EXACT
        assert largest_difference(replayed, plain) < EXACT
        assert torch.equal(report.losses, expected_report.losses)
        assert torch.equal(report.latents, expected_report.latents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "strategy",
    [DRaFT(num_train_steps=4), AlignProp(start="uniform"), FullBackpropagation()],
    ids=repr,
)
def test_graph_with_attached_inputs_is_the_plain_run(strategy, kind):
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=10, eta=0.5)
    chain = toy.chain(strategy, sampler)
    plain = toy.plain_gradients(chain.plan, sampler.timesteps(1000), eta=0.5)
    for checkpoint in (False, True):
        recorded, _ = toy.run(GraphEngine(checkpoint=checkpoint), chain)
        assert largest_difference(recorded, plain) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", [DRaFTLV(), DRaFTLV(num_renoised=3, reduction="mean")])
def test_replay_of_renoised_copies_is_the_graph(strategy, kind):
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=4)
    chain = toy.chain(strategy, sampler)
    replayed, report = toy.run(ReplayEngine(), chain)
    recorded, _ = toy.run(GraphEngine(), chain)
    assert largest_difference(replayed, recorded) < EXACT
    assert report.renoised_losses.shape == (strategy.num_renoised, BATCH)

    # Written out: every copy is a sample of a run of one step, from a noised clean image.
    schedule, timestep = toy.schedule, sampler.timesteps(1000)[-1]
    level = schedule.alphas_cumprod[timestep].item()
    total = toy.plain_gradients(chain.plan, sampler.timesteps(1000))
    noise = toy.noise
    for copy_index in range(strategy.num_renoised):
        copy = level**0.5 * report.latents + (1 - level) ** 0.5 * noise.of_copy(copy_index)
        toy.noise = type("Given", (), {"initial": lambda _, copy=copy: copy})()
        plan = DRaFT().plan(1, 0, 0)
        for name, gradient in toy.plain_gradients(plan, [timestep]).items():
            total[name] += gradient
    toy.noise = noise
    images = 1 if strategy.reduction == "sum" else 1 + strategy.num_renoised
    assert largest_difference(replayed, {n: g / images for n, g in total.items()}) < EXACT


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_replay_is_the_graph_where_the_noisiest_level_has_no_signal(kind):
    toy, sampler = Toy(kind, zero_snr=True), DDIMSampler(num_inference_steps=5)
    chain = toy.chain(DRTune(num_train_steps=5), sampler)
    replayed, _ = toy.run(ReplayEngine(), chain)
    recorded, _ = toy.run(GraphEngine(), chain)
    assert largest_difference(replayed, recorded) < EXACT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampler",
    [
        SchedulerSampler(scheduler="unipc", num_inference_steps=8),
        SchedulerSampler(scheduler="dpmpp", num_inference_steps=8),
        EulerSampler(num_inference_steps=8),
    ],
    ids=lambda sampler: getattr(sampler, "scheduler", "euler"),
)
@pytest.mark.parametrize("early_stop", [0, 4])
def test_replay_is_the_graph_for_other_samplers(sampler, kind, early_stop):
    toy = Toy(kind)
    chain = toy.chain(DRTune(num_train_steps=3, early_stop=early_stop), sampler, step=2)
    replayed, _ = toy.run(ReplayEngine(), chain)
    recorded, _ = toy.run(GraphEngine(), chain)
    assert largest_difference(replayed, recorded) < EXACT


@pytest.mark.parametrize(
    "strategy",
    [
        DRTune(num_train_steps=3),
        DRTune(num_train_steps=3, early_stop=5),
        ReFL(first_step=2, last_step=5),
        FullBackpropagation(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_map_serves_like_the_recursion_it_comes_from(strategy, kind):
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=8, eta=0.6)
    plan = strategy.plan(8, 0, 0)
    summed = Chain.from_path(sampler.path(toy.schedule), toy.schedule, plan)
    expected, _ = toy.run(GraphEngine(), toy.chain(strategy, sampler))
    assert largest_difference(toy.run(GraphEngine(), summed)[0], expected) < EXACT
    if plan.replayable:
        assert largest_difference(toy.run(ReplayEngine(), summed)[0], expected) < EXACT


def test_guidance_in_an_interval_replays_the_unguided_pass_where_it_is_on():
    toy = Toy(scale=4.0, interval=(200, 700))
    chain = toy.chain(DRTune(num_train_steps=5), DDIMSampler(num_inference_steps=10))
    calls = []
    unguided = toy.network(torch.zeros_like(toy.text))

    def counted(latents, timesteps, rows=None):
        if torch.is_grad_enabled():
            calls.extend(timesteps.tolist())
        return unguided(latents, timesteps, rows)

    recorded, _ = toy.run(GraphEngine(), chain)
    toy.net.zero_grad()
    denoiser = GuidedDenoiser(
        conditional=toy.network(toy.text), unconditional=counted, guidance=toy.guidance
    )
    ReplayEngine().run(chain, denoiser, toy.noise, toy.loss)
    assert largest_difference(toy.gradients(), recorded) < EXACT
    trained = [chain.path.timesteps[index] for index in chain.plan.train_steps]
    assert set(calls) == {timestep for timestep in trained if 200 <= timestep <= 700}
    assert set(calls) not in (set(), set(trained))


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_step_has_a_gradient(kind):
    """Also for sample prediction, whose steps forget their latents if those carry gradient."""
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=6)
    chain = toy.chain(DRTune(num_train_steps=6), sampler)
    toy.net.zero_grad()
    norms = StepGradientNorms(toy.net.parameters())
    toy.run(ReplayEngine(), chain, after_step=norms)
    assert set(norms.norms) == set(range(6))
    largest = max(norm.item() for norm in norms.norms.values())
    for index in range(6):
        assert norms.norms[index] > 1e-4 * largest
        alone, _ = toy.run(GraphEngine(), toy.chain(Chosen(index), sampler))
        norm = torch.stack([gradient.norm() for gradient in alone.values()]).norm()
        torch.testing.assert_close(norms.norms[index], norm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.8])
def test_factors_are_the_closed_forms(kind, eta):
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=10, eta=eta)
    chain = toy.chain(DRTune(num_train_steps=10), sampler)
    levels = [toy.schedule.alphas_cumprod[t].item() for t in sampler.timesteps(1000)] + [1.0]
    for factor, now, then in zip(chain.factors, levels[:-1], levels[1:], strict=True):
        injected = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        ratio, next_ratio = ((1 - now) / now) ** 0.5, ((1 - then - injected**2) / then) ** 0.5
        expected = {
            "epsilon": next_ratio - ratio,
            "v_prediction": now**0.5 * (next_ratio - ratio),
            "sample": 1 - next_ratio / ratio,
        }[kind]
        assert factor == pytest.approx(expected, rel=1e-12)


def test_factors_of_long_align_are_the_published_ones():
    """Sums over the trained steps by offset, N = 50, Stable Diffusion's schedule, to 3 digits."""
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    sampler = DDIMSampler(num_inference_steps=50)
    factors = Chain.of(sampler, schedule, LongAlign().plan(50, 0, 0)).factors
    assert [round(-factor, 3) for factor in factors[:5]] == [1.648, 1.424, 1.233, 1.072, 0.935]
    assert round(-factors[-1], 3) == 0.134
    sums = [round(-sum(factors[offset::10]), 2) for offset in range(10)]
    assert sums == [2.36, 2.07, 1.82, 1.61, 1.43, 1.28, 1.14, 1.03, 0.94, 0.93]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [DRTune, DRaFT, ReFL, AlignProp, LongAlign, FullBackpropagation])
def test_normalizing_divides_by_the_sum_of_the_factors(kind, make):
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=40)
    plain = toy.chain(make(), sampler)
    normalized = toy.chain(make(normalize=True), sampler)
    total = sum(abs(plain.factors[index]) for index in plain.plan.train_steps)
    engine = ReplayEngine() if plain.plan.replayable else GraphEngine()
    expected, _ = toy.run(engine, plain)
    found, report = toy.run(engine, normalized)
    expected = {name: gradient / total for name, gradient in expected.items()}
    assert largest_difference(found, expected) < EXACT
    scaled = {i: plain.factors[i] / total for i in plain.plan.train_steps}
    assert report.factors == pytest.approx(scaled, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_the_input_removes_the_nested_jacobians_and_nothing_else(kind):
    """The gradient is a sum over steps of J_i^T v_i, with v_i the loss's gradient at output i.

    Attached, v_i goes through all later calls of the network; detached, through none.
    """
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=5)
    steps, timesteps = sampler.steps(toy.schedule), sampler.timesteps(1000)
    weights = {name: weight.detach() for name, weight in toy.net.named_parameters()}

    def output(latents, timestep, weights=weights):
        at = torch.full((BATCH,), timestep)
        on, off = (
            torch.func.functional_call(toy.net, weights, (latents, at, text))
            for text in (toy.text, torch.zeros_like(toy.text))
        )
        return off + toy.guidance.scale * (on - off)

    def rest(latents, first, nested):
        for step in steps[first:]:
            if nested:
                latents = step.a * latents + step.b * output(latents, step.timestep)
            else:
                latents = step.carried * latents
        return latents

    seen = [toy.noise.initial()]
    for step in steps:
        seen.append(step.a * seen[-1] + step.b * output(seen[-1], step.timestep))
    clean = seen[-1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(toy.loss(clean, torch.arange(BATCH)).sum(), clean)
    for strategy, nested in ((FullBackpropagation(), True), (DRTune(num_train_steps=5), False)):
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for index, step in enumerate(steps):
            after = seen[index + 1].detach().requires_grad_()
            end = rest(after, index + 1, nested)
            (cotangent,) = torch.autograd.grad(end, after, gradient)
            trained = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
            called = output(seen[index], timesteps[index], trained)
            parts = torch.autograd.grad(called, list(trained.values()), step.b * cotangent)
            for name, part in zip(trained, parts, strict=True):
                total[name] += part
        found, _ = toy.run(GraphEngine(), toy.chain(strategy, sampler))
        assert largest_difference(found, total) < EXACT


SAME = [
    (DRaFT(num_train_steps=6), FullBackpropagation()),
    (AlignProp(start="fixed", first_step=0), FullBackpropagation()),
    (DRaFTLV(num_renoised=0), DRaFT()),
    (Chosen(5), DRaFT()),  # DRTune with K = 1 whose offset is the last step
    (AlignProp(start="fixed", first_step=5), DRaFT()),
    (ReFL(first_step=5, last_step=5), DRaFT()),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("strategy", "other"), SAME, ids=[repr(pair[0]) for pair in SAME])
def test_strategies_meet_at_their_ends(strategy, other, kind):
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=6)
    expected, _ = toy.run(GraphEngine(), toy.chain(other, sampler))
    chain = toy.chain(strategy, sampler)
    assert largest_difference(toy.run(GraphEngine(), chain)[0], expected) < EXACT
    if chain.plan.replayable:
        assert largest_difference(toy.run(ReplayEngine(), chain)[0], expected) < EXACT


def test_drtune_of_one_step_is_draft_of_one_where_it_draws_the_last():
    steps = (DRTune(num_train_steps=1).plan(6, 0, step) for step in itertools.count())
    plan = next(plan for plan in steps if plan.train_steps == (5,))
    assert plan.scores_final
    assert plan == Chosen(5).plan(6, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_full_is_the_sampler_differentiated(kind):
    toy, sampler = Toy(kind), DDIMSampler(num_inference_steps=6)
    found, report = toy.run(GraphEngine(), toy.chain(FullBackpropagation(), sampler))
    toy.net.zero_grad()
    initial = toy.noise.initial()
    clean = sampler.sample(toy.denoiser, initial, toy.schedule, enable_grad=True)
    toy.loss(clean, torch.arange(BATCH)).sum().backward()
    torch.testing.assert_close(report.latents, clean.detach(), rtol=1e-12, atol=1e-12)
    assert largest_difference(found, toy.gradients()) < EXACT


def test_replay_is_the_graph_for_a_unet_of_diffusers():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=3,
        attention_head_dim=2,
        norm_num_groups=4,
    ).double()
    toy = Toy("v_prediction", scale=5.0)
    toy.net = unet
    text = torch.randn(BATCH, 5, 3, dtype=torch.float64)

    def network(text):
        def call(latents, timesteps, rows=None):
            context = text if rows is None else text[rows]
            return unet(latents, timesteps, encoder_hidden_states=context).sample

        return call

    denoiser = GuidedDenoiser(
        conditional=network(text),
        unconditional=network(text[:1].expand(BATCH, -1, -1)),
        guidance=toy.guidance,
    )
    chain = toy.chain(DRTune(num_train_steps=3), DDIMSampler(num_inference_steps=7, eta=0.3))
    found = []
    for engine in (ReplayEngine(micro_batch_size=4), GraphEngine(checkpoint=True)):
        unet.zero_grad()
        engine.run(chain, denoiser, toy.noise, toy.loss)
        found.append([weight.grad.clone() for weight in unet.parameters()])
    # A few weights have no effect (a shift before a normalisation), so their gradients are
    # rounding alone; they are held to the norm of all.
    scale = torch.stack([gradient.norm() for gradient in found[1]]).norm()
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() < EXACT * max(expected.norm(), 1e-6 * scale)
