import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from toy_rollout import BATCH, Toy, largest_difference

from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.disabled_lora import disabled_lora
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.scheduler_sampler import SchedulerSampler
from segalign.errors import ConfigError, NonFiniteError
from segalign.truncation.draft import DRaFT, DRaFTLV, FullBackpropagation
from segalign.truncation.drtune import DRTune
from segalign.truncation.graph import GraphEngine
from segalign.truncation.penalty import ReferencePenalty, WithoutLora
from segalign.truncation.replay import ReplayEngine

SAME_SUMS = 1e-12  # the same terms, added in another order
STEPS = 6
KINDS = ["epsilon", "v_prediction", "sample"]
ROW_WEIGHTS = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
ENGINES = [
    ReplayEngine(),
    ReplayEngine(micro_batch_size=2),
    GraphEngine(),
    GraphEngine(checkpoint=True, micro_batch_size=2),
]


def reference_of(toy, network=None):
    """Bind another network, or the toy's with other weights, to the toy's texts."""
    if network is None:
        network = copy.deepcopy(toy.net).requires_grad_(False)
        for weight in network.parameters():
            weight.mul_(0.8)

    def call(latents, timesteps, rows=None):
        assert not torch.is_grad_enabled()
        return network(latents, timesteps, toy.text if rows is None else toy.text[rows])

    return call


def penalty_of(toy, chain, kind, reference=None, **settings):
    settings = {"row_weights": ROW_WEIGHTS, "weight": 3.0, **settings}
    reference = reference or reference_of(toy)
    return ReferencePenalty.of(chain, toy.denoiser, reference, kind=kind, **settings)


def plain_penalty(toy, chain, inputs, reference, scale_of):
    """Write the penalties out at given inputs; return their sum over steps, ``(B,)``."""
    total = torch.zeros(BATCH, dtype=torch.float64)
    for index, latents in inputs.items():
        timesteps = torch.full((BATCH,), chain.timesteps[index])
        with torch.no_grad():
            expected = reference(latents, timesteps)
        squares = (toy.net(latents, timesteps, toy.text) - expected).square().flatten(1)
        total = total + ROW_WEIGHTS * scale_of(index, squares)
    return total


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["l2", "kl"])
def test_a_penalty_adds_its_own_gradient_at_the_trained_steps(engine, kind, measure):
    toy = Toy(kind)
    sampler = DDIMSampler(num_inference_steps=STEPS, eta=0.6)
    chain = toy.chain(DRTune(num_train_steps=3, normalize=True), sampler, step=1)
    reference = reference_of(toy)
    penalty = penalty_of(toy, chain, measure, reference)
    expected, alone = toy.run(engine, chain)

    def scale_of(index, squares):
        step = chain.steps[index]
        if measure == "l2":
            return 3.0 / 3 * squares.mean(1)
        if not step.noise:
            return 0 * squares.sum(1)
        return 3.0 / 3 * (3.0 * step.b) ** 2 / (2 * step.noise**2) * squares.sum(1)

    toy.net.zero_grad()
    penalties = plain_penalty(toy, chain, alone.inputs, reference, scale_of)
    penalties.sum().backward()
    expected = {name: expected[name] + more for name, more in toy.gradients().items()}
    found, report = toy.run(engine, chain, penalty=penalty)
    assert largest_difference(found, expected) < SAME_SUMS
    torch.testing.assert_close(report.penalties, penalties.detach(), rtol=SAME_SUMS, atol=0)
    assert torch.equal(report.penalties > 0, ROW_WEIGHTS > 0)
    assert not report.penalties.requires_grad
    assert torch.equal(alone.penalties, torch.zeros(BATCH, dtype=torch.float64))
    assert torch.equal(report.losses, alone.losses)


@pytest.mark.parametrize("guidance", [{"scale": 4.0}, {"scale": 4.0, "interval": (0, 400)}])
def test_the_divergence_is_that_of_the_samplers_transitions(guidance):
    toy = Toy("v_prediction", **guidance)
    sampler = DDIMSampler(num_inference_steps=STEPS, eta=0.8)
    chain = toy.chain(DRTune(num_train_steps=STEPS), sampler)
    reference = reference_of(toy)
    ones = torch.ones(BATCH, dtype=torch.float64)
    penalty = penalty_of(toy, chain, "kl", reference, row_weights=ones)
    _, report = toy.run(ReplayEngine(), chain, penalty=penalty)
    unguided = toy.network(torch.zeros_like(toy.text))
    total = torch.zeros(BATCH, dtype=torch.float64)
    with torch.no_grad():
        for index, latents in report.inputs.items():
            step, at = chain.steps[index], torch.full((BATCH,), chain.timesteps[index])
            off, transitions = unguided(latents, at), []
            for conditional in (toy.network(toy.text), reference):
                output = conditional(latents, at)
                if toy.guidance.is_active(step.timestep, 1000):
                    output = off + toy.guidance.scale * (output - off)
                mean = step.a * latents + step.b * output
                if step.noise:
                    transitions.append(torch.distributions.Normal(mean, step.noise))
            if transitions:
                divergence = torch.distributions.kl_divergence(*transitions)
                total += 3.0 / STEPS * divergence.flatten(1).sum(1)
    assert len(report.inputs) == STEPS
    torch.testing.assert_close(report.penalties, total, rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_train_steps", [1, 3, STEPS])
def test_the_weight_does_not_depend_on_the_number_of_trained_steps(num_train_steps):
    toy = Toy()
    chain = toy.chain(
        DRTune(num_train_steps=num_train_steps), DDIMSampler(num_inference_steps=STEPS)
    )
    off_by_two = lambda *call: toy.network(toy.text)(*call) + 2  # noqa: E731
    penalty = penalty_of(toy, chain, "l2", off_by_two, weight=0.25)
    _, report = toy.run(ReplayEngine(), chain, penalty=penalty)
    torch.testing.assert_close(report.penalties, ROW_WEIGHTS, rtol=SAME_SUMS, atol=0)


def test_the_trained_network_is_not_called_more_often_in_replay():
    toy = Toy()
    chain = toy.chain(DRTune(num_train_steps=3), DDIMSampler(num_inference_steps=STEPS))
    penalty, calls = penalty_of(toy, chain, "l2"), []
    toy.net.first.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    toy.run(ReplayEngine(), chain)
    without = list(calls)
    calls.clear()
    toy.run(ReplayEngine(), chain, penalty=penalty)
    assert calls == without


@pytest.mark.parametrize("strategy", [DRaFT(num_train_steps=3), FullBackpropagation()], ids=repr)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_penalty_ends_at_the_input_of_its_step_where_inputs_are_attached(strategy, checkpoint):
    toy, sampler = Toy("v_prediction"), DDIMSampler(num_inference_steps=4)
    chain, engine = toy.chain(strategy, sampler), GraphEngine(checkpoint=checkpoint)
    num_trained, reference = len(chain.plan.train_steps), reference_of(toy)
    expected, alone = toy.run(engine, chain)
    toy.net.zero_grad()
    plain_penalty(
        toy, chain, alone.inputs, reference, lambda _, s: 3.0 / num_trained * s.mean(1)
    ).sum().backward()
    expected = {name: expected[name] + more for name, more in toy.gradients().items()}
    penalty = penalty_of(toy, chain, "l2", reference)
    found, _ = toy.run(engine, chain, penalty=penalty)
    assert largest_difference(found, expected) < SAME_SUMS


@pytest.mark.parametrize("size", [2, 4, 100])
def test_renoised_copies_have_no_penalty(size):
    toy = Toy()
    chain = toy.chain(DRaFTLV(num_renoised=2), DDIMSampler(num_inference_steps=3))
    penalty = penalty_of(toy, chain, "l2")
    recorded, expected = toy.run(GraphEngine(), chain, penalty=penalty)
    replayed, report = toy.run(ReplayEngine(micro_batch_size=size), chain, penalty=penalty)
    assert largest_difference(replayed, recorded) < SAME_SUMS
    torch.testing.assert_close(report.penalties, expected.penalties, rtol=SAME_SUMS, atol=0)
    alone = toy.chain(DRaFT(), DDIMSampler(num_inference_steps=3))
    _, single = toy.run(GraphEngine(), alone, penalty=penalty)
    torch.testing.assert_close(report.penalties, single.penalties, rtol=SAME_SUMS, atol=0)


def test_the_conditional_output_is_penalised_also_where_guidance_has_no_use_of_it():
    toy = Toy(scale=0.0)
    chain = toy.chain(DRTune(num_train_steps=2), DDIMSampler(num_inference_steps=4))
    penalty = penalty_of(toy, chain, "l2")
    recorded, _ = toy.run(GraphEngine(), chain, penalty=penalty)
    replayed, report = toy.run(ReplayEngine(), chain, penalty=penalty)
    assert report.penalties.sum() > 0
    assert largest_difference(replayed, recorded) < SAME_SUMS


@pytest.fixture
def adapted():
    """A toy with adapters that change its output, and a copy of it from before."""
    toy = Toy()
    before = copy.deepcopy(toy.net).requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["first", "text", "last"], init_lora_weights=False)
    inject_adapter_in_model(config, toy.net)
    toy.net.double()
    toy.gradients = lambda: {
        name: weight.grad.clone() for name, weight in toy.net.named_parameters() if "lora_" in name
    }
    return toy, before


@pytest.mark.parametrize("engine", ENGINES, ids=repr)
def test_the_network_without_its_adapters_is_the_frozen_copy(adapted, engine):
    toy, before = adapted
    chain = toy.chain(DRTune(num_train_steps=2), DDIMSampler(num_inference_steps=4))
    frozen = penalty_of(toy, chain, "l2", reference_of(toy, before))
    expected, expected_report = toy.run(engine, chain, penalty=frozen)
    switched = penalty_of(toy, chain, "l2", WithoutLora(toy.network(toy.text), toy.net))
    found, report = toy.run(engine, chain, penalty=switched)
    assert torch.equal(report.penalties > 0, ROW_WEIGHTS > 0)
    assert largest_difference(found, expected) < SAME_SUMS
    torch.testing.assert_close(report.penalties, expected_report.penalties, rtol=SAME_SUMS, atol=0)


def test_adapters_are_as_before_after_an_error(adapted):
    toy, before = adapted
    frozen = toy.net.first.lora_A["default"].weight.requires_grad_(False)
    asked = {name: weight.requires_grad for name, weight in toy.net.named_parameters()}
    call = toy.noise.initial(), torch.full((BATCH,), 500), toy.text
    trained = toy.net(*call)
    seen = []

    def fails(*inputs):
        seen.append(toy.net(*inputs))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        WithoutLora(fails, toy.net)(*call)
    assert torch.equal(seen[0], before(*call))
    assert torch.equal(toy.net(*call), trained)
    assert not torch.equal(trained, before(*call))
    assert {name: weight.requires_grad for name, weight in toy.net.named_parameters()} == asked
    assert not frozen.requires_grad
    with disabled_lora(toy.net):
        with disabled_lora(toy.net):
            pass
        assert torch.equal(toy.net(*call), before(*call))


def test_a_network_without_adapters_has_no_reference():
    with pytest.raises(ConfigError, match="with adapters; got `TinyNet` without"):
        WithoutLora(lambda *_: None, Toy().net)(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(
    ("sampler", "strategy", "guidance", "message"),
    [
        (DDIMSampler(num_inference_steps=4), DRTune(num_train_steps=2), {}, "got none at step"),
        (DDIMSampler(num_inference_steps=4), DRaFT(), {}, "got none at step 0 of 4"),
        (
            DDIMSampler(num_inference_steps=1, eta=1.0),
            DRTune(num_train_steps=1),
            {},
            "got none at step 0 of 1",
        ),
        (
            SchedulerSampler(scheduler="dpmpp", num_inference_steps=4),
            DRTune(num_train_steps=2),
            {},
            "got one that is multistep or clips",
        ),
        (
            ClippedSampler(num_inference_steps=4, eta=1.0),
            DRTune(num_train_steps=2),
            {},
            "got one that is multistep or clips",
        ),
        (
            DDIMSampler(num_inference_steps=4, eta=1.0),
            DRTune(num_train_steps=2),
            {"rescale": 0.5},
            r"guidance without `rescale` .*got 0\.5",
        ),
    ],
)
def test_a_divergence_needs_gaussian_transitions(sampler, strategy, guidance, message):
    toy = Toy()
    toy.guidance = Guidance(scale=3.0, **guidance)
    chain = toy.chain(strategy, sampler)
    with pytest.raises(ConfigError, match=message) as caught:
        penalty_of(toy, chain, "kl")
    assert "\n" not in str(caught.value)
    assert penalty_of(toy, chain, "l2").step_scale.count_nonzero() == len(chain.plan.train_steps)


def test_the_last_step_has_no_divergence():
    toy = Toy()
    chain = toy.chain(DRaFT(), DDIMSampler(num_inference_steps=4, eta=1.0))
    _, report = toy.run(ReplayEngine(), chain, penalty=penalty_of(toy, chain, "kl"))
    assert torch.equal(report.penalties, torch.zeros(BATCH, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "js"}, "`kind` must be one of `l2`, `kl`; got 'js'"),
        ({"weight": -1.0}, r"`weight` must be at least 0; got -1\.0"),
        ({"weight": float("nan")}, "`weight` must be at least 0; got nan"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    toy = Toy()
    chain = toy.chain(DRaFT(), DDIMSampler(num_inference_steps=2))
    with pytest.raises(ConfigError, match=message):
        penalty_of(toy, chain, **{"kind": "l2", **settings})


@pytest.mark.parametrize("engine", [ReplayEngine, GraphEngine])
def test_penalties_that_cannot_be_followed_are_named(engine):
    toy = Toy()
    chain = toy.chain(DRTune(num_train_steps=2), DDIMSampler(num_inference_steps=4))
    with pytest.raises(ConfigError, match=r"one penalty for each of 3 rows; got shape \(\)"):
        toy.run(engine(), chain, penalty=lambda outputs, *_: outputs.sum())
    bad = lambda outputs, *call: outputs.flatten(1).sum(1) / (call[2] != 1)  # noqa: E731
    with pytest.raises(NonFiniteError, match=r"finite penalties; .* images \[1\] of 3"):
        toy.run(engine(), chain, penalty=bad)
    _, report = toy.run(engine(check_finite=False), chain, penalty=bad)
    assert report.penalties.isfinite().tolist() == [True, False, True]


def test_distances_are_measured_in_float32_at_least():
    step_scale, rows = torch.ones(10), torch.arange(1)
    penalty = ReferencePenalty(
        reference=lambda *_: torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16),
        row_weights=torch.ones(1),
        kind="kl",
        step_scale=step_scale,
    )
    outputs = torch.full((1, 1, 64, 64), 1 + 1 / 128, dtype=torch.bfloat16)
    (found,) = penalty(outputs, outputs, rows, rows)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(4096 * (1 + 1 / 128) ** 2, rel=1e-6)
