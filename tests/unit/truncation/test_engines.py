import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from toy_rollout import BATCH, SHAPE, FixedNoise, Lean, Toy, largest_difference

from segalign.diffusion.guidance import Guidance
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import ConfigError, NonFiniteError
from segalign.rng import counter_normal
from segalign.text.conditioning import TextConditioning, TextReport
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser, TextNetwork
from segalign.truncation.draft import DRaFT, DRaFTLV, FullBackpropagation
from segalign.truncation.drtune import DRTune
from segalign.truncation.graph import GraphEngine
from segalign.truncation.noise import CounterNoise, select_rows
from segalign.truncation.replay import ReplayEngine
from segalign.truncation.step_norms import StepGradientNorms

TRAINED = 4
SAME_SUMS = 1e-12  # the same terms, added in another order


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def sampler():
    return DDIMSampler(num_inference_steps=8, eta=0.4)


@pytest.fixture
def chain(toy, sampler):
    return toy.chain(DRTune(num_train_steps=TRAINED), sampler)


@pytest.mark.parametrize("loss_batch_size", [1, 2, None])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 7, 12, 100])
def test_micro_batches_of_replay_change_nothing(toy, chain, micro_batch_size, loss_batch_size):
    expected, expected_report = toy.run(ReplayEngine(), chain)
    sizes = []
    toy.net.first.register_forward_hook(
        lambda _, inputs, __: sizes.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    engine = ReplayEngine(micro_batch_size=micro_batch_size, loss_batch_size=loss_batch_size)
    found, report = toy.run(engine, chain)
    assert largest_difference(found, expected) < SAME_SUMS
    torch.testing.assert_close(report.losses, expected_report.losses, rtol=SAME_SUMS, atol=0)
    # Both terms of guidance see every pair of a sample and a trained step once.
    assert sum(sizes) == 2 * BATCH * TRAINED
    assert max(sizes) == min(micro_batch_size, BATCH * TRAINED)


@pytest.mark.parametrize("strategy", [DRTune(num_train_steps=3), DRaFT(num_train_steps=3)])
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_of_the_graph_change_nothing(toy, strategy, size):
    chain = toy.chain(strategy, DDIMSampler(num_inference_steps=5, eta=0.4))
    expected, expected_report = toy.run(GraphEngine(), chain)
    engine = GraphEngine(micro_batch_size=size, loss_batch_size=1, checkpoint=True)
    found, report = toy.run(engine, chain)
    assert largest_difference(found, expected) < SAME_SUMS
    torch.testing.assert_close(report.latents, expected_report.latents, rtol=SAME_SUMS, atol=0)
    assert report.inputs.keys() == expected_report.inputs.keys()


def test_micro_batches_mix_renoised_copies_with_the_run(toy):
    chain = toy.chain(DRaFTLV(num_renoised=2), DDIMSampler(num_inference_steps=3))
    expected, _ = toy.run(ReplayEngine(), chain)
    for size in (2, 4, 9):
        found, _ = toy.run(ReplayEngine(micro_batch_size=size), chain)
        assert largest_difference(found, expected) < SAME_SUMS


def test_gradients_add_up_over_runs(toy, chain):
    once, _ = toy.run(ReplayEngine(), chain)
    ReplayEngine().run(chain, toy.denoiser, toy.noise, toy.loss)
    twice = toy.gradients()
    assert largest_difference(twice, {n: 2 * gradient for n, gradient in once.items()}) < SAME_SUMS


@pytest.mark.parametrize("engine", [ReplayEngine(micro_batch_size=5), GraphEngine()], ids=repr)
def test_a_backward_of_the_caller_is_told_which_is_the_last(toy, chain, engine):
    expected, _ = toy.run(engine, chain)
    last = []

    def backward(loss, is_last):
        last.append(is_last)
        loss.backward()

    found, _ = toy.run(engine, chain, backward=backward)
    assert largest_difference(found, expected) < SAME_SUMS
    assert last == [False] * (len(last) - 1) + [True]


def test_step_norms_measure_each_step_and_leave_the_gradient(toy, chain):
    expected, _ = toy.run(ReplayEngine(), chain)
    toy.net.zero_grad()
    norms = StepGradientNorms(toy.net.parameters())
    found, report = toy.run(ReplayEngine(micro_batch_size=100), chain, after_step=norms)
    assert largest_difference(found, expected) < SAME_SUMS
    assert list(norms.norms) == list(report.factors) == list(chain.plan.train_steps)
    total = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    assert 0 < max(norms.norms.values()) <= sum(norms.norms.values())
    assert total <= sum(norms.norms.values())


def test_step_norms_restart_where_gradients_are_there_already(toy, chain):
    norms = StepGradientNorms(toy.net.parameters())
    toy.run(ReplayEngine(), chain, after_step=norms)
    expected = dict(norms.norms)
    before = toy.gradients()
    norms.restart()
    assert norms.norms == {}
    ReplayEngine().run(chain, toy.denoiser, toy.noise, toy.loss, after_step=norms)
    for index, norm in expected.items():
        torch.testing.assert_close(norms.norms[index], norm, rtol=1e-9, atol=0)
    after = toy.gradients()
    assert (
        largest_difference(after, {n: 2 * gradient for n, gradient in before.items()}) < SAME_SUMS
    )


@pytest.mark.parametrize("engine", [ReplayEngine(), GraphEngine()], ids=repr)
def test_steps_without_gradient_use_the_rollout_network(toy, chain, engine):
    expected, expected_report = toy.run(engine, chain)
    rollout = Lean(toy.denoiser)
    found, report = toy.run(engine, chain, rollout=rollout)
    assert largest_difference(found, expected) < SAME_SUMS
    assert torch.equal(report.latents, expected_report.latents)
    called = 8 if isinstance(engine, ReplayEngine) else 8 - TRAINED
    assert rollout.events.index("released") == called
    assert set(rollout.events[called:]) == {"released"}


@pytest.mark.parametrize("strategy", [DRTune(num_train_steps=3), DRaFTLV(num_renoised=2)], ids=repr)
def test_replay_releases_the_rollout_network_before_anything_is_decoded_or_replayed(toy, strategy):
    chain = toy.chain(strategy, DDIMSampler(num_inference_steps=6, eta=0.4))
    expected, _ = toy.run(GraphEngine(), chain)
    rollout, loss, network = Lean(toy.denoiser), toy.loss, toy.net.first
    toy.loss = lambda *images: (rollout.events.append("scored"), loss(*images))[1]
    network.register_forward_hook(
        lambda *_: rollout.events.append("replayed") if torch.is_grad_enabled() else None
    )
    found, _ = toy.run(ReplayEngine(), chain, rollout=rollout)
    assert largest_difference(found, expected) < SAME_SUMS
    copies, trained = chain.plan.num_renoised, len(chain.plan.train_steps)
    calls = [*chain.timesteps, *chain.timesteps[-1:] * copies]
    scored = ["scored"] * (1 + copies)
    assert rollout.events == [*calls, "released", *scored, *["replayed"] * 2 * (trained + copies)]


@pytest.mark.parametrize(
    ("strategy", "engine", "called"),
    [
        # Steps 2 and 3 of 4 are trained: the calls before are the last ones.
        (DRaFT(num_train_steps=2), GraphEngine(), 2),
        (FullBackpropagation(), GraphEngine(), 0),
        (DRaFT(num_train_steps=2), GraphEngine(micro_batch_size=2), 0),
    ],
)
def test_the_graph_releases_the_rollout_network_after_its_last_call(toy, strategy, engine, called):
    chain = toy.chain(strategy, DDIMSampler(num_inference_steps=4))
    expected, _ = toy.run(engine, chain)
    rollout = Lean(toy.denoiser)
    toy.net.first.register_forward_hook(
        lambda *_: rollout.events.append("recorded") if torch.is_grad_enabled() else None
    )
    found, _ = toy.run(engine, chain, rollout=rollout)
    assert largest_difference(found, expected) < SAME_SUMS
    assert rollout.events[: called + 1] == [*chain.timesteps[:called], "released"]
    assert "recorded" in rollout.events


def test_replay_does_not_wait_for_the_device(toy, monkeypatch):
    """Neither for numbers, which a meta tensor has none of, nor to bring some there."""

    def bring(*_, **__):
        raise AssertionError("brings numbers to the device")

    weight = torch.zeros((), device="meta", requires_grad=True)
    noise = type("Noise", (), {"initial": lambda _: torch.zeros(BATCH, *SHAPE, device="meta")})()
    denoiser = GuidedDenoiser(
        conditional=lambda latents, timesteps, _: weight * latents * timesteps.view(-1, 1, 1, 1)
    )
    chain = toy.chain(DRTune(num_train_steps=3), DDIMSampler(num_inference_steps=6))
    monkeypatch.setattr(torch, "tensor", bring)
    engine = ReplayEngine(micro_batch_size=4, check_finite=False)
    engine.run(chain, denoiser, noise, lambda latents, _: latents.square().flatten(1).sum(1))
    assert weight.grad is not None


def test_an_early_stop_runs_no_later_step(toy, sampler):
    strategy = DRTune(num_train_steps=2, early_stop=7)
    chain = toy.chain(strategy, sampler)
    assert chain.plan.last_step < 7
    rollout = Lean(toy.denoiser)
    toy.run(ReplayEngine(), chain, rollout=rollout)
    assert rollout.events == [*sampler.timesteps(1000)[: chain.plan.last_step + 1], "released"]


@pytest.mark.parametrize("engine", [ReplayEngine(), GraphEngine()], ids=repr)
def test_weights_of_decoder_and_reward_get_no_gradient(toy, chain, engine):
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    loss = toy.loss
    toy.loss = lambda latents, rows: scale * loss(latents, rows)
    toy.run(engine, chain)
    assert scale.grad is None


class LiveBytes:
    """Counts what autograd keeps for the backward pass."""

    def __init__(self):
        self.now = self.peak = 0

    def hooks(self):
        return saved_tensors_hooks(lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor)


class _Kept:
    def __init__(self, tensor, live):
        self.tensor, self.live = tensor.detach(), live
        self.size = tensor.numel() * tensor.element_size()
        live.now += self.size
        live.peak = max(live.peak, live.now)

    def __del__(self):
        self.live.now -= self.size


def peak_bytes(engine, num_train_steps, num_steps=25):
    toy, live = Toy(), LiveBytes()
    strategy = DRTune(num_train_steps=num_train_steps)
    chain = toy.chain(strategy, DDIMSampler(num_inference_steps=num_steps))
    with live.hooks():
        toy.run(engine, chain)
    return live.peak


def test_memory_of_replay_depends_neither_on_trained_steps_nor_on_steps():
    peaks = [peak_bytes(ReplayEngine(), k) for k in (1, 5, 25)]
    peaks += [peak_bytes(ReplayEngine(), 5, num_steps) for num_steps in (5, 50)]
    assert peaks[0] > 0
    assert max(peaks) <= 1.05 * min(peaks)
    smaller = peak_bytes(ReplayEngine(micro_batch_size=1), 25)
    assert smaller < 0.6 * peaks[0]
    graph = [peak_bytes(GraphEngine(), k) for k in (1, 5, 25)]
    assert graph[1] > 4 * graph[0]
    assert graph[2] > 20 * graph[0]
    assert peak_bytes(GraphEngine(checkpoint=True), 25) < 0.5 * graph[2]


@pytest.mark.parametrize("engine", [ReplayEngine(), GraphEngine()], ids=repr)
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda x, _: x.flatten(1).sum(1).detach(), ConfigError, "a gradient.* carries none"),
        (
            lambda x, _: torch.ones(len(x), requires_grad=True),
            ConfigError,
            "does not depend on the images",
        ),
        (
            lambda x, rows: x.flatten(1).sum(1) / (rows != 1),
            NonFiniteError,
            r"finite losses .* images \[1\] of 3",
        ),
        (
            lambda x, rows: (x.flatten(1).square().sum(1) * (rows != 2)).sqrt(),
            NonFiniteError,
            r"finite gradients .* images \[2\] of 3",
        ),
        (lambda x, _: x.sum(), ConfigError, r"one loss for each of 3 images; got shape \(\)"),
    ],
)
def test_a_reward_that_cannot_be_followed_is_named_at_once(
    toy, chain, engine, loss, error, message
):
    toy.loss = loss
    with pytest.raises(error, match=message) as caught:
        toy.run(engine, chain)
    assert "\n" not in str(caught.value)
    assert all(weight.grad is None for weight in toy.net.parameters())


@pytest.mark.parametrize("engine", [ReplayEngine(), GraphEngine()], ids=repr)
def test_a_network_without_trained_weights_is_refused(toy, chain, engine):
    toy.net.requires_grad_(False)
    with pytest.raises(ConfigError, match="Train some of its weights"):
        toy.run(engine, chain)


@pytest.mark.parametrize("strategy", [DRaFT(num_train_steps=2), FullBackpropagation()], ids=repr)
def test_replay_refuses_attached_inputs_and_offers_the_graph(toy, sampler, strategy):
    with pytest.raises(ConfigError, match=r"got attached ones .*graph\.GraphEngine"):
        toy.run(ReplayEngine(), toy.chain(strategy, sampler))


def test_replay_refuses_rescaled_guidance_and_offers_the_graph(toy, chain):
    toy.guidance = Guidance(scale=3.0, rescale=0.7)
    with pytest.raises(ConfigError, match="or use the graph engine"):
        toy.run(ReplayEngine(), chain)
    toy.run(GraphEngine(), chain)


def test_a_chain_refuses_steps_that_are_not_linear_or_not_as_many(toy, sampler):
    plan = DRTune(num_train_steps=2).plan(8, 0, 0)
    with pytest.raises(ConfigError, match="linear in the output; got `str`"):
        Chain.from_steps(["clip"] * 8, toy.schedule, plan)
    with pytest.raises(ConfigError, match="a sampler of 8 steps, as the plan has; got 5"):
        Chain.of(DDIMSampler(num_inference_steps=5), toy.schedule, plan)
    with pytest.raises(ConfigError, match="a sampler of 8 steps, as the plan has; got 5"):
        Chain.from_path(DDIMSampler(num_inference_steps=5).path(toy.schedule), toy.schedule, plan)


@pytest.mark.parametrize("engine", [ReplayEngine, GraphEngine])
@pytest.mark.parametrize("name", ["micro_batch_size", "loss_batch_size"])
def test_engines_refuse_empty_batches(engine, name):
    with pytest.raises(ConfigError, match=f"`{name}` must be at least 1; got 0"):
        engine(**{name: 0})


def test_guidance_needs_a_negative_prompt(toy):
    with pytest.raises(ConfigError, match="expected a negative prompt for guidance of 2"):
        GuidedDenoiser(conditional=toy.network(toy.text), guidance=Guidance(scale=2))


def test_without_guidance_the_network_is_called_once(toy, chain):
    denoiser = GuidedDenoiser(conditional=toy.network(toy.text))
    calls = []
    toy.net.first.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    ReplayEngine().run(chain, denoiser, toy.noise, toy.loss)
    assert (calls.count(False), calls.count(True)) == (8, TRAINED)


def test_a_text_network_gives_each_row_its_caption():
    embeds = torch.arange(6.0).view(3, 2, 1)
    report = TextReport((1,) * 3, (0,) * 3, (0,) * 3, (2,) * 3)
    for pooled in (None, embeds[:, 0]):
        text = TextConditioning(embeds, embeds[..., 0] > 1, pooled, report)
        network = TextNetwork(lambda *call: call, text)
        _, _, whole = network(torch.zeros(3), torch.zeros(3))
        assert whole is text
        _, _, some = network(torch.zeros(4), torch.zeros(4), torch.tensor([2, 0, 0, 1]))
        assert torch.equal(some.prompt_embeds, embeds[[2, 0, 0, 1]])
        assert torch.equal(some.attention_mask, text.attention_mask[[2, 0, 0, 1]])
        if pooled is not None:
            assert torch.equal(some.pooled, pooled[[2, 0, 0, 1]])


def test_counter_noise_follows_the_sample_not_the_batch():
    def draws(step, *sample_ids):
        noise = CounterNoise(seed=1, step=step, sample_ids=sample_ids, latent_shape=(2, 3, 3))
        return [noise.initial(), noise.of_step(0), noise.of_step(1), noise.of_copy(0)]

    together, alone, later = draws(5, 7, 8, 9), draws(5, 8), draws(6, 8)
    for whole, row in zip(together, alone, strict=True):
        assert torch.equal(whole[1:2], row)
    everything = torch.cat([*together, *later]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)
    wide = CounterNoise(seed=1, step=5, sample_ids=[8], latent_shape=(2, 3, 3), dtype=torch.float64)
    assert wide.initial().dtype == torch.float64


def test_rows_of_noise_are_drawn_alone(monkeypatch):
    noise = CounterNoise(seed=1, step=5, sample_ids=[7, 8, 9], latent_shape=(2, 3, 3))
    whole = [noise.initial(), noise.of_step(3), noise.of_copy(1)]
    drawn = []

    def draw(purpose, rows, shape):
        drawn.extend(row[2] for row in rows)
        return counter_normal(purpose, rows, shape)

    monkeypatch.setattr("segalign.truncation.noise.counter_normal", draw)
    some = select_rows(noise, range(1, 3))
    for all_rows, rows in zip(
        whole, [some.initial(), some.of_step(3), some.of_copy(1)], strict=True
    ):
        assert torch.equal(rows, all_rows[1:])
    assert drawn == [8, 9] * 3
    # A noise that cannot choose is drawn whole.
    fixed = FixedNoise()
    other = select_rows(fixed, range(1, 3))
    assert torch.equal(other.initial(), fixed.initial()[1:])
    assert torch.equal(other.of_step(3), fixed.of_step(3)[1:])
    assert torch.equal(other.of_copy(1), fixed.of_copy(1)[1:])
