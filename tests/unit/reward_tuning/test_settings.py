"""Settings of a step: which engine serves them, and what is refused before anything is sampled."""

import math
from dataclasses import replace

import pytest

from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.sampler import DDIMSampler, EulerSampler
from segalign.diffusion.scheduler_sampler import SchedulerSampler
from segalign.errors import ConfigError
from segalign.reward_tuning.settings import (
    PenaltySettings,
    RewardStepSettings,
    StepMemory,
    check_penalty,
    choose_engine,
)
from segalign.truncation.alignprop import AlignProp
from segalign.truncation.draft import DRaFT, DRaFTLV, FullBackpropagation
from segalign.truncation.drtune import DRTune, LongAlign
from segalign.truncation.graph import GraphEngine
from segalign.truncation.refl import ReFL
from segalign.truncation.replay import ReplayEngine

CLIPPED = ClippedSampler(num_inference_steps=10)
RESCALED = DDIMSampler(num_inference_steps=10, guidance_scale=3.0, guidance_rescale=0.5)
NOISY = DDIMSampler(num_inference_steps=10, eta=0.5)
REPLAYED = [
    DRTune(), DRTune(early_stop=4), LongAlign(), ReFL(first_step=7, last_step=9), DRaFT(),
    DRaFTLV(), AlignProp(start="fixed"),
]  # fmt: skip
RECORDED = [DRaFT(num_train_steps=2), AlignProp(start="fixed", first_step=5), FullBackpropagation()]


def settings(strategy=None, **others):
    sampler = others.pop("sampler", DDIMSampler(num_inference_steps=10))
    return RewardStepSettings(strategy=strategy or DRTune(), sampler=sampler, **others)


def engine_of(chosen):
    return choose_engine(
        chosen.engine, chosen.plan(0, 0), chosen.memory, is_linear=chosen.is_linear
    )


@pytest.mark.parametrize("strategy", REPLAYED)
def test_auto_replays_wherever_that_is_exact(strategy):
    assert isinstance(engine_of(settings(strategy)), ReplayEngine)
    assert isinstance(engine_of(settings(strategy, engine="replay")), ReplayEngine)
    assert isinstance(engine_of(settings(strategy, engine="graph")), GraphEngine)


@pytest.mark.parametrize(
    "sampler", [EulerSampler(num_inference_steps=10), SchedulerSampler(num_inference_steps=10)]
)
def test_linear_samplers_are_replayed(sampler):
    assert isinstance(engine_of(settings(sampler=sampler)), ReplayEngine)


@pytest.mark.parametrize(
    ("strategy", "sampler", "cause"),
    [(strategy, DDIMSampler(num_inference_steps=10), "attaches inputs") for strategy in RECORDED]
    + [
        (DRTune(), sampler, "comes with a sampler that clips, or")
        for sampler in (CLIPPED, RESCALED)
    ],
)
def test_what_cannot_be_replayed_is_recorded_or_refused(strategy, sampler, cause):
    assert isinstance(engine_of(settings(strategy, sampler=sampler)), GraphEngine)
    message = rf"^expected a strategy that `engine: replay` can .* one that {cause}[^\n]+$"
    with pytest.raises(ConfigError, match=message):
        settings(strategy, sampler=sampler, engine="replay")


def test_engines_take_their_sizes_from_the_memory_and_leave_numbers_to_the_caller():
    memory = StepMemory(replay_batch_size=3, decode_batch_size=2, checkpoint_steps=False)
    replayed = engine_of(settings(memory=memory))
    assert replayed == ReplayEngine(micro_batch_size=3, loss_batch_size=2, check_finite=False)
    recorded = engine_of(settings(memory=memory, engine="graph"))
    assert recorded == GraphEngine(
        checkpoint=False, micro_batch_size=3, loss_batch_size=2, check_finite=False
    )
    assert engine_of(settings(engine="graph")).checkpoint


@pytest.mark.parametrize("name", ["rollout", "replay", "decode"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=rf"^`{name}_batch_size` must be at least 1; got 0\. "):
        StepMemory(**{f"{name}_batch_size": 0})


@pytest.mark.parametrize(("size", "alone"), [(None, True), (1, True), (4, True), (5, False)])
def test_pairs_of_several_steps_share_a_call_where_it_holds_more_than_a_batch(size, alone):
    assert StepMemory(replay_batch_size=size).is_step_alone(4) is alone


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DRTune(num_train_steps=11), r"^`num_train_steps` must be <= .* \(10\); got 11\. "),
        (DRTune(early_stop=10), r"^`early_stop` must be < .* \(10\); got 10\. "),
        (ReFL(), r"^`last_step` must be < .* \(10\); got 39\. "),
        (DRaFT(num_train_steps=11), r"^`num_train_steps` must be <= .* \(10\); got 11\. "),
    ],
)
def test_strategies_that_do_not_fit_the_number_of_steps_are_refused(strategy, message):
    with pytest.raises(ConfigError, match=message):
        settings(strategy)


def test_plans_are_those_of_the_strategy_for_the_samplers_steps():
    chosen = settings(DRTune(num_train_steps=3))
    assert chosen.plan(4, 7) == DRTune(num_train_steps=3).plan(10, 4, 7)
    assert settings().is_linear
    assert not settings(sampler=CLIPPED).is_linear


@pytest.mark.parametrize("strategy", [DRaFT(), DRaFTLV(), ReFL(first_step=2, last_step=9)])
def test_a_divergence_needs_steps_before_the_last(strategy):
    """ReFL ends the run at the step that it trains, whichever that is."""
    message = (
        rf"^expected a strategy that trains steps with injected noise .* got "
        rf"`{type(strategy).__name__}`, which trains the last one alone; use kind `l2`$"
    )
    with pytest.raises(ConfigError, match=message):
        check_penalty(PenaltySettings(kind="kl"), settings(strategy, sampler=NOISY))
    check_penalty(PenaltySettings(kind="l2"), settings(strategy))
    check_penalty(None, settings(strategy))


class LastStepAtFirst:
    """Trains the last step alone in the first optimizer step, and another one later."""

    def plan(self, num_steps, seed, step):
        strategy = DRTune(num_train_steps=1) if step else DRaFT()
        return strategy.plan(num_steps, seed, step)


def test_a_strategy_that_draws_the_last_step_by_chance_may_have_a_divergence():
    check_penalty(PenaltySettings(kind="kl"), settings(LastStepAtFirst(), sampler=NOISY))
    check_penalty(PenaltySettings(kind="kl"), settings(DRTune(num_train_steps=5), sampler=NOISY))


@pytest.mark.parametrize(
    "sampler",
    [
        DDIMSampler(num_inference_steps=10),
        CLIPPED,
        EulerSampler(num_inference_steps=10),
        replace(NOISY, guidance_scale=2.0, guidance_rescale=0.5),
    ],
)
def test_a_divergence_needs_linear_steps_with_noise(sampler):
    with pytest.raises(
        ConfigError, match=r"^expected DDIM with `eta` > 0, [^\n]*or use kind `l2`$"
    ):
        check_penalty(PenaltySettings(kind="kl"), settings(sampler=sampler))


@pytest.mark.parametrize(
    ("name", "value"), [("kind", "L3"), ("weight", -1.0), ("weight", math.nan)]
)
def test_penalties_that_make_no_sense_refuse_themselves(name, value):
    with pytest.raises(ConfigError, match=rf"^penalty `{name}` must be [^\n]*got"):
        PenaltySettings(**{name: value})
