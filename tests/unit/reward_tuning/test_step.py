"""A step's gradient: that of the composition written out, whatever is computed at a time."""

import copy
import math
import weakref
from functools import partial

import pytest
import torch
import toy_tuning
from toy_tuning import (
    CODEC,
    PlainRun,
    ToyCodec,
    batch,
    clip_reward,
    generator,
    gradients,
    largest_difference,
    make_step,
    plain_loss,
    plain_rewards,
    run,
    with_lora,
)

from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.rollout import RolloutSettings
from segalign.errors import ConfigError
from segalign.reward_tuning.settings import PenaltySettings, StepMemory
from segalign.rewards.latent_loss import RewardObjective
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.truncation.draft import DRaFT, DRaFTLV
from segalign.truncation.drtune import DRTune, LongAlign
from segalign.truncation.plan import TruncationPlan
from segalign.truncation.refl import ReFL
from segalign.truncation.step_norms import StepGradientNorms

EXACT = 1e-10
FIRST_INVALID = (False, True, True, True)

CASES = {
    "one_step": (DRTune(num_train_steps=1), {}),
    "two_steps_v": (DRTune(num_train_steps=2), {"kind": "v_prediction"}),
    "two_steps_sample": (DRTune(num_train_steps=2), {"kind": "sample", "scale": 1.0}),
    "noise_is_injected": (DRTune(num_train_steps=2), {"eta": 0.7}),
    "noise_is_injected_v": (DRTune(num_train_steps=3), {"eta": 1.0, "kind": "v_prediction"}),
    "early_stop": (DRTune(num_train_steps=2, early_stop=2), {"kind": "v_prediction", "eta": 0.5}),
    "long_align": (LongAlign(), {"num_steps": 7, "kind": "v_prediction"}),
    "long_align_sample": (LongAlign(), {"num_steps": 6, "kind": "sample", "eta": 0.3}),
    "refl": (ReFL(first_step=1, last_step=3), {}),
    "refl_v": (ReFL(first_step=2, last_step=2), {"kind": "v_prediction", "eta": 1.0}),
}


RECORDED = ("two_steps_v", "noise_is_injected_v", "early_stop", "refl")


@pytest.mark.parametrize(
    ("case", "engine"),
    [(case, "replay") for case in CASES] + [(case, "graph") for case in RECORDED],
)
def test_the_gradient_is_that_of_the_composition_written_out(case, engine):
    strategy, settings = CASES[case]
    step = make_step(strategy, engine=engine, **settings)
    plain = PlainRun(step)
    expected = plain.gradients(plain_loss)
    ours, report = run(step)
    assert largest_difference(ours, expected) <= EXACT
    rewards = plain_rewards(CODEC.decode(plain.latents).clamp(0, 1)).detach()
    torch.testing.assert_close(report.rewards["rewards"], rewards, rtol=EXACT, atol=0)
    torch.testing.assert_close(report.losses, -2 * rewards / 4, rtol=EXACT, atol=0)
    outside = (CODEC.decode(plain.latents) - 0.5).abs() > 0.5
    assert 0.02 < outside.double().mean() < 0.95


def test_the_trained_steps_follow_the_optimizer_step(monkeypatch):
    offsets = set()
    for number in range(5):
        monkeypatch.setattr(toy_tuning, "STEP", number)
        step = make_step(DRTune(num_train_steps=2))
        ours, report = run(step, optimizer_step=number)
        assert largest_difference(ours, PlainRun(step).gradients(plain_loss)) <= EXACT
        assert report.factors.keys() == set(report.plan.train_steps)
        offsets.add(report.plan.train_steps[0])
    assert len(offsets) > 1


def test_gradients_are_added_to_those_that_are_there():
    step = make_step(DRTune(num_train_steps=1))
    once, _ = run(step)
    with torch.no_grad():
        text = step.generator.conditioner(batch()["captions"])
    step.run(batch(), text, toy_tuning.STEP)
    doubled = {name: 2 * gradient for name, gradient in once.items()}
    assert largest_difference(gradients(step.generator.unet), doubled) <= EXACT


PARTS = {
    "sampled": {"memory": StepMemory(rollout_batch_size=3)},
    "sampled_one_by_one": {"memory": StepMemory(rollout_batch_size=1)},
    "replayed": {"memory": StepMemory(replay_batch_size=3)},
    "replayed_together": {"memory": StepMemory(replay_batch_size=7)},
    "decoded": {"memory": StepMemory(decode_batch_size=3)},
    "decoded_again": {"memory": StepMemory(checkpoint_decode=True)},
    "all": {
        "memory": StepMemory(
            rollout_batch_size=3, replay_batch_size=2, decode_batch_size=1, checkpoint_decode=True
        )
    },
    "guided_one_by_one": {"rollout": RolloutSettings(pair_guidance=False)},
    "cached_text": {"rollout": RolloutSettings(cache_text=True)},
    "graph_in_parts": {
        "engine": "graph",
        "memory": StepMemory(rollout_batch_size=3, replay_batch_size=2, decode_batch_size=1),
    },
    "graph_recorded": {"engine": "graph", "memory": StepMemory(checkpoint_steps=False)},
}


@pytest.mark.parametrize("parts", PARTS)
def test_what_is_computed_at_a_time_changes_nothing(parts, whole):
    """The common direction is estimated from the batch, so that a part's own would differ."""
    expected, report = whole
    ours, other = run(make_step(DRTune(num_train_steps=2), eta=0.5, **PARTS[parts]))
    assert largest_difference(ours, expected) <= EXACT
    assert report.rewards.keys() == other.rewards.keys() >= {"rewards", "common_share"}
    for name, values in report.rewards.items():
        torch.testing.assert_close(other.rewards[name], values, rtol=EXACT, atol=1e-12)
    torch.testing.assert_close(other.losses, report.losses, rtol=EXACT, atol=0)


@pytest.fixture(scope="module")
def whole():
    torch.set_num_threads(1)
    return run(make_step(DRTune(num_train_steps=2), eta=0.5))


@pytest.mark.parametrize("merge", [None, False])
def test_adapters_are_merged_for_the_rollout_alone(merge):
    unet = with_lora()
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    step = make_step(
        DRTune(num_train_steps=2), unet=unet,
        rollout=RolloutSettings(merge_lora=merge, cache_text=True),
    )  # fmt: skip
    expected = PlainRun(step).gradients(plain_loss)
    assert expected.keys() == {name for name in before if "lora_" in name}
    ours, _ = run(step)
    assert largest_difference(ours, expected) <= EXACT
    assert all(torch.equal(weight, before[name]) for name, weight in unet.named_parameters())


def broken_without_text(images, captions):
    """A reward that is NaN, with a NaN gradient, where there is no caption."""
    signs = [1.0 if caption else math.nan for caption in captions]
    return (images.square().mean(dim=(1, 2, 3)) * images.new_tensor(signs)).sqrt()


@pytest.mark.parametrize("size", [None, 1])
def test_rows_that_are_not_valid_contribute_nothing(size):
    strategy, data = DRTune(num_train_steps=2), batch(FIRST_INVALID)
    step = make_step(
        strategy, reward=broken_without_text, memory=StepMemory(rollout_batch_size=size)
    )

    def loss(images):
        rewards = images.clamp(0, 1).square().mean(dim=(1, 2, 3)).sqrt()
        return -2 * rewards[1:].sum() / 4

    expected = PlainRun(step, data["captions"]).gradients(loss)
    ours, report = run(step, data)
    assert largest_difference(ours, expected) <= EXACT
    assert report.losses[0] == 0
    assert report.rewards["rewards"].isfinite().tolist() == list(FIRST_INVALID)
    assert report.non_finite() is None


def count_calls(step, data):
    """Count calls of the network, of the reward's images and of back-propagation."""
    counts = {"network": 0, "reward": 0, "backward": 0}
    towers = step.reward.scorer

    def count(name):
        counts[name] += 1

    def backward(loss, _is_last):
        count("backward")
        loss.backward()

    original, towers.image_features = (
        towers.image_features,
        lambda images: (count("reward"), original(images))[1],
    )
    hook = step.generator.unet.register_forward_hook(lambda *_: count("network"))
    try:
        return run(step, data, backward=backward)[0], counts
    finally:
        hook.remove()


@pytest.mark.parametrize("engine", ["replay", "graph"])
def test_a_batch_without_a_valid_row_makes_the_same_calls_and_no_gradient(engine):
    """Other ranks count on it."""
    make = partial(
        make_step, DRTune(num_train_steps=2), engine=engine,
        memory=StepMemory(rollout_batch_size=2, decode_batch_size=1),
    )  # fmt: skip
    _, calls = count_calls(make(), batch())
    ours, others = count_calls(make(), batch((False,) * 4))
    assert calls == others
    assert min(calls.values()) >= 2
    assert not any(gradient.any() for gradient in ours.values())


@pytest.mark.parametrize(("kind", "eta"), [("l2", 0.0), ("kl", 0.8)])
@pytest.mark.parametrize(
    ("lora", "engine"), [(True, "replay"), (False, "replay"), (False, "graph")]
)
def test_a_penalty_keeps_trained_outputs_near_the_start(kind, eta, lora, engine):
    unet, reference = (with_lora(), None) if lora else (None, generator(unet=perturbed()))
    step = make_step(
        DRTune(num_train_steps=2), unet=unet, eta=eta, engine=engine, reference=reference,
        penalty=PenaltySettings(kind=kind, weight=0.7), memory=StepMemory(replay_batch_size=3),
    )  # fmt: skip
    start = toy_tuning.base()[0] if lora else reference.unet
    plain = PlainRun(step)
    plain.reference = partial(plain.output, start)
    expected = plain.gradients(plain_loss, kind, 0.7)
    assert largest_difference(expected, PlainRun(step).gradients(plain_loss)) > 1e-3
    ours, report = run(step)
    assert largest_difference(ours, expected) <= EXACT
    total = 0.7 * plain.penalty.item() / len(report.plan.train_steps)
    assert report.penalties.sum().item() == pytest.approx(total, rel=EXACT)
    if not lora:
        assert not any(weight.grad is not None for weight in reference.unet.parameters())


def perturbed():
    unet = copy.deepcopy(toy_tuning.base()[0]).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        for weight in unet.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return unet


@pytest.mark.parametrize("saturated", ["zero", "pass"])
@pytest.mark.parametrize("hinge", [None, 0.02])
def test_saturated_pixels_and_a_hinge(saturated, hinge):
    step = make_step(
        DRTune(num_train_steps=2), saturated=saturated,
        objective=RewardObjective(scale=2.0, hinge=hinge),
    )  # fmt: skip

    def loss(images):
        clamped = images.clamp(0, 1)
        if saturated == "pass":
            clamped = images + (clamped - images).detach()
        rewards = plain_rewards(clamped)
        seen.append(rewards.detach())
        losses = -rewards if hinge is None else (hinge - rewards).clamp(min=0)
        return 2 * losses.mean()

    seen = []
    expected = PlainRun(step).gradients(loss)
    if hinge is not None:  # some images are above it, and some below
        assert 0 < (seen[0] < hinge).sum() < 4
    ours, _ = run(step)
    assert largest_difference(ours, expected) <= EXACT


def test_a_reward_that_is_not_finite_is_reported_and_not_raised():
    def broken(images, captions):
        signs = [math.nan if caption == "Two owls." else 1.0 for caption in captions]
        return images.mean(dim=(1, 2, 3)) * images.new_tensor(signs)

    parts = {"good": WeightedReward(reward=clip_reward()), "bad": WeightedReward(reward=broken)}
    step = make_step(DRTune(num_train_steps=2), reward=RewardMixture(parts))
    _, report = run(step)
    assert report.losses.isfinite().tolist() == [True, False, True, True]
    assert report.totals.isfinite().tolist() == [True, False, True, True]
    assert report.non_finite() == "the reward: `bad` for rows [1]"


@pytest.mark.parametrize("engine", ["replay", "graph"])
def test_a_copy_whose_reward_is_not_finite_is_reported(engine):
    def broken(images, captions):
        """NaN at the second call, which is of the first copy."""
        calls.append(len(images))
        signs = [math.nan if len(calls) == 2 and c == "Two owls." else 1.0 for c in captions]
        return images.mean(dim=(1, 2, 3)) * images.new_tensor(signs)

    calls = []
    _, report = run(make_step(DRaFTLV(num_renoised=2), reward=broken, engine=engine))
    assert calls == [4, 4, 4]
    assert report.losses.isfinite().all()
    assert report.totals.isfinite().tolist() == [True, False, True, True]
    assert report.non_finite() == "the reward: `rewards` for rows [1]"


@pytest.mark.parametrize("engine", ["replay", "graph"])
def test_a_penalty_that_is_not_finite_is_reported(engine):
    reference = generator(unet=perturbed())
    with torch.no_grad():
        reference.unet.conv_out.bias.fill_(math.nan)
    step = make_step(
        DRTune(num_train_steps=2), reference=reference, engine=engine,
        penalty=PenaltySettings(), memory=StepMemory(rollout_batch_size=3),
    )  # fmt: skip
    _, report = run(step, batch(FIRST_INVALID))
    assert report.losses.isfinite().all()
    assert not report.totals[1:].isfinite().any()
    assert report.non_finite() == "the penalty for rows [1, 2, 3]"


def test_a_reward_without_gradient_is_refused_by_its_name():
    def rounded(images, captions):
        return images.round().mean(dim=(1, 2, 3)).detach()

    step = make_step(DRTune(num_train_steps=1), reward=rounded)
    with pytest.raises(ConfigError, match=r"values of the reward `rounded` with a gradient"):
        run(step)


def test_the_bias_of_another_decoder_is_that_of_its_gradients():
    other, same = ToyCodec(seed=9), ToyCodec()
    find = partial(make_step, DRTune(num_train_steps=2), memory=StepMemory(decode_batch_size=2))
    assert run(find())[1].decoder_bias is None
    assert run(find(), compare_decoders=True)[1].decoder_bias is None  # it is the model's own
    assert run(find(decode=other.decode))[1].decoder_bias is None
    equal = run(find(decode=same.decode), compare_decoders=True)[1].decoder_bias
    torch.testing.assert_close(equal.cosine, torch.ones(2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(equal.norm_ratio, torch.ones(2).double(), rtol=0, atol=1e-12)

    ours, report = run(find(decode=other.decode), compare_decoders=True)
    plain = PlainRun(find())
    plain.gradients(plain_loss)
    latents = plain.latents.requires_grad_()
    full, biased = (
        torch.autograd.grad(plain_loss(decode(latents)), latents)[0][:2].flatten(1)
        for decode in (CODEC.decode, other.decode)
    )
    expected = torch.cosine_similarity(full, biased)
    torch.testing.assert_close(report.decoder_bias.cosine, expected, rtol=1e-9, atol=0)
    ratio = biased.norm(dim=1) / full.norm(dim=1)
    torch.testing.assert_close(report.decoder_bias.norm_ratio, ratio, rtol=1e-9, atol=0)
    assert (expected.abs() < 0.9).all()
    # Looking changes no gradient.
    unseen, _ = run(find(decode=other.decode))
    assert all(torch.equal(ours[name], unseen[name]) for name in ours)


def test_strategies_that_attach_inputs_and_samplers_that_clip_are_recorded():
    attached = make_step(DRaFT(num_train_steps=2))
    ours, report = run(attached)
    again, _ = run(make_step(DRaFT(num_train_steps=2), engine="graph"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert report.plan.train_steps == (2, 3)
    clipped = ClippedSampler(num_inference_steps=4, guidance_scale=3.0, clip_range=0.8)
    _, report = run(make_step(DRTune(num_train_steps=2), sampler=clipped))
    assert report.factors == {}
    assert run(make_step(DRTune(num_train_steps=2)))[1].factors.keys() == {*report.plan.train_steps}


def test_renoised_copies_are_scored_too():
    runs = [
        run(make_step(DRaFTLV(num_renoised=2), engine=engine, memory=memory))
        for engine, memory in (("replay", StepMemory()), ("graph", StepMemory(replay_batch_size=3)))
    ]
    assert largest_difference(runs[0][0], runs[1][0]) <= EXACT
    plain, expected = run(make_step(DRaFT(num_train_steps=1)))
    assert largest_difference(runs[0][0], plain) > 0.1
    for _, report in runs:  # what is reported is the image's own, and the copies' beside it
        assert report.rewards.keys() == expected.rewards.keys() | {"renoised"}
        for name, values in expected.rewards.items():
            torch.testing.assert_close(report.rewards[name], values, rtol=EXACT, atol=1e-12)
        copies = -report.renoised_losses.mean(0) * 4 / 2  # four samples, a scale of two
        assert report.renoised_losses.shape == (2, 4)
        torch.testing.assert_close(report.rewards["renoised"], copies, rtol=EXACT, atol=0)
        assert (copies - values).abs().min() > 1e-6


@pytest.mark.parametrize("size", [None, 2, 4, 5])
def test_trained_steps_are_told_one_after_the_other_where_they_come_alone(size):
    """Pairs of several steps in one call have no gradient of their own; parts show the last."""
    step = make_step(DRTune(num_train_steps=2), memory=StepMemory(replay_batch_size=size))
    norms = StepGradientNorms(step.generator.unet.parameters())
    _, report = run(step, observer=norms)
    assert list(norms.norms) == ([] if size == 5 else list(report.plan.train_steps))


def test_step_norms_of_a_batch_in_parts_are_those_of_the_last_part():
    """The gradient of the parts before is no part of the first step's."""
    memory = StepMemory(rollout_batch_size=3)
    step = make_step(DRTune(num_train_steps=2), memory=memory, reward=brightness)
    norms = StepGradientNorms(step.generator.unet.parameters())
    whole, report = run(step, observer=norms)
    for index in report.plan.train_steps:
        # One row alone is left, of a reward that does not compare captions.
        alone = make_step(Chosen(index), memory=memory, reward=brightness)
        last, _ = run(alone, batch((False, False, False, True)))
        expected = torch.stack([gradient.norm() for gradient in last.values()]).norm()
        torch.testing.assert_close(norms.norms[index], expected, rtol=1e-9, atol=0)
        assert expected < 0.7 * torch.stack([gradient.norm() for gradient in whole.values()]).norm()


def brightness(images, captions):
    return images.square().mean(dim=(1, 2, 3))


class Chosen:
    """A strategy that trains one given step."""

    def __init__(self, index):
        self.index = index

    def plan(self, num_steps, seed, step):
        return TruncationPlan(
            num_steps=num_steps, train_steps=(self.index,), last_step=num_steps - 1,
            detach_input=True,
        )  # fmt: skip


MERGED = RolloutSettings(merge_lora=True, cache_text=True)


def held_by(rollout):
    """Refer weakly to merged weights and to cached keys and values."""
    merged = rollout._lora._stand_ins
    assert merged
    tensors = [
        *(module.weight for layer, module in merged.items()
          if module.weight is not layer.get_base_layer().weight),
        *(projected for stand_in in rollout._cache._stand_ins.values()
          for _, projected in stand_in.known),
    ]  # fmt: skip
    return [weakref.ref(tensor) for tensor in tensors]


@pytest.mark.parametrize(
    "strategy", [DRTune(num_train_steps=2), DRaFTLV(num_renoised=2)], ids=["steps", "copies"]
)
def test_nothing_merged_or_cached_is_alive_when_images_are_decoded_and_steps_replayed(strategy):
    unet = with_lora()
    expected, _ = run(make_step(strategy, unet=unet, rollout=RolloutSettings(merge_lora=False)))
    held, alive = [], []

    def look():
        alive.append(sum(one() is not None for one in held))

    def decode(latents):
        look()
        return CODEC.decode(latents)

    def backward(loss, _is_last):
        look()
        loss.backward()

    step = make_step(strategy, unet=unet, rollout=MERGED, decode=decode)

    def note(*_):
        if not held:
            held.extend(held_by(step.rollout))

    hook = unet.register_forward_hook(note)
    ours, _ = run(step, backward=backward)
    hook.remove()
    assert len(held) > 10
    assert len(alive) > 2
    assert not any(alive)
    assert largest_difference(ours, expected) <= EXACT
