"""The rule fires on what speaks against the images, after patience, and not on noise."""

import json
import random

import pytest

from segalign.errors import ConfigError
from segalign.evaluation.hacking_rule import HackingRule
from segalign.evaluation.hacking_settings import HackingSettings
from segalign.evaluation.reading import Reading, paired_error, spread

REWARD, HELD_OUT, TO_V = "monitor/reward", "monitor/held_out/other", "image_to_v_similarity"
START = {
    REWARD: 1.0,
    HELD_OUT: 2.0,
    TO_V: 0.1,
    "lpips_diversity": 0.5,
    "lpips_drift_ratio": 0.0,
    "cross_prompt_similarity": 0.4,
    "high_frequency": 0.1,
    "sharpness": 0.02,
}
NOISY = (REWARD, HELD_OUT, TO_V)


def around(mean: float, seed: int, size: float = 0.1, count: int = 64) -> list[float]:
    """Values of captions that differ by 0.1, the same ones for every seed, and a little noise."""
    captions, own = random.Random(0), random.Random(seed)
    values = [captions.gauss(0, size) + own.gauss(0, size / 10) for _ in range(count)]
    shift = mean - sum(values) / count
    return [value + shift for value in values]


def reading(step: int, *, count: int = 64, without=(), **changes: float) -> Reading:
    names = {"reward": REWARD, "held_out": HELD_OUT, "to_v": TO_V}
    values = START | {names.get(name, name): value for name, value in changes.items()}
    values = {name: value for name, value in values.items() if name not in without}
    noisy = [name for name in NOISY if name in values]
    per_image = {name: around(values[name], step, count=count) for name in noisy}
    return Reading(step, values, per_image)


def judge(*readings: Reading, rule: HackingRule | None = None):
    rule = rule or HackingRule()
    return [rule.judge(one) for one in readings]


GOOD = {"reward": 1.3, "held_out": 2.2}
WITNESSES = {
    "fallen": ({"reward": 1.3, "held_out": 1.9}, "`monitor/held_out/other` has fallen from 2 at"),
    "cross-prompt": (GOOD | {"cross_prompt_similarity": 0.5}, "other captions look alike"),
    "to V": (GOOD | {"to_v": 0.35}, "fit any caption better"),
    "texture": (GOOD | {"high_frequency": 0.4}, "detail is off: `high_frequency` 0.1 to 0.4"),
    "blur": (GOOD | {"sharpness": 0.005}, "detail is off: `sharpness` 0.02 to 0.005"),
    "collapse": ({"reward": 1.3, "lpips_diversity": 0.3}, "one caption look alike"),
    "drift": ({"reward": 1.3, "lpips_drift_ratio": 0.9}, "have left those of the start"),
}


@pytest.mark.parametrize("witness", WITNESSES)
def test_each_witness_raises_suspicion_after_two_evaluations(witness):
    changes, expected = WITNESSES[witness]
    verdicts = judge(*(reading(s, **(changes if s else {})) for s in (0, 20, 40, 60)))
    assert [verdict.suspected for verdict in verdicts] == [False, False, True, True]
    assert [verdict.is_new for verdict in verdicts] == [False, False, True, False]
    assert [verdict.since for verdict in verdicts] == [None, 20, 20, 20]
    assert verdicts[0].reasons == ()
    for verdict in verdicts[1:]:
        assert len(verdict.reasons) == 1
        assert expected in verdict.reasons[0]
        assert "\n" not in verdict.reasons[0]


@pytest.mark.parametrize("witness", WITNESSES)
def test_without_a_rise_of_the_reward_nothing_is_hacked(witness):
    changes, _ = WITNESSES[witness]
    later = [reading(step, **(changes | {"reward": 1.001})) for step in (20, 40)]
    assert not any(verdict.reasons for verdict in judge(reading(0), *later))


def test_a_good_run_is_not_suspected():
    rising = [
        reading(20, reward=1.1, held_out=2.1, lpips_diversity=0.3, lpips_drift_ratio=0.6),
        reading(40, reward=1.3, held_out=2.2, lpips_diversity=0.2, lpips_drift_ratio=1.0),
        reading(60, reward=1.4, held_out=2.2, high_frequency=0.2, sharpness=0.04),
        reading(80, reward=1.4, held_out=2.199, to_v=0.12, cross_prompt_similarity=0.41),
    ]
    assert not any(verdict.reasons for verdict in judge(reading(0), *rising))


def test_lost_diversity_counts_where_no_held_out_reward_confirms_the_gain():
    collapsed = {"lpips_diversity": 0.2, "reward": 1.3}
    for held_out, count in ((2.2, 0), (2.001, 1)):
        verdict = judge(reading(0), reading(20, held_out=held_out, **collapsed))[-1]
        assert len(verdict.reasons) == count
    # It has risen since the start, but fallen from its best: two reasons.
    path = [
        reading(0),
        reading(20, reward=1.2, held_out=2.4),
        reading(40, held_out=2.2, **collapsed),
    ]
    assert len(judge(*path)[-1].reasons) == 2
    # Another one has risen: where one has fallen, none confirms.
    another = {"monitor/held_out/another": 3.0}
    first, later = reading(0), reading(20, held_out=1.9, **collapsed)
    pair = [Reading(0, {**first.values, "monitor/held_out/another": 2.0}, first.per_image)]
    pair += [Reading(20, {**later.values, **another}, later.per_image)]
    assert len(judge(*pair)[-1].reasons) == 2
    blind = [reading(s, without=(HELD_OUT,), **(collapsed if s else {})) for s in (0, 20)]
    assert len(judge(*blind)[-1].reasons) == 1


def test_a_held_out_reward_is_held_against_its_best():
    # Still above the start, but far below what it had reached.
    path = {0: (1.0, 2.0), 20: (1.2, 2.4), 40: (1.3, 2.3), 60: (1.4, 2.2)}
    verdicts = judge(*(reading(s, reward=r, held_out=h) for s, (r, h) in path.items()))
    assert [verdict.suspected for verdict in verdicts] == [False, False, False, True]
    assert "has fallen from 2.4 at step 20 to 2.3" in verdicts[2].reasons[0]
    assert "to 2.2" in verdicts[3].reasons[0]


def test_one_bad_evaluation_is_not_enough_and_a_good_one_starts_anew():
    path = [1.9, 2.2, 1.9, 2.2, 1.9]
    later = [reading(20 * n, reward=1.3, held_out=h) for n, h in enumerate(path, start=1)]
    verdicts = judge(reading(0), *later)
    assert [bool(verdict.reasons) for verdict in verdicts[1:]] == [True, False, True, False, True]
    assert not any(verdict.suspected for verdict in verdicts)


def test_suspicion_ends_and_may_come_back():
    rule = HackingRule(HackingSettings(patience=1))
    path = [1.9, 2.2, 1.9]
    later = [reading(20 * n, reward=1.3, held_out=h) for n, h in enumerate(path, start=1)]
    verdicts = judge(reading(0), *later, rule=rule)
    assert [(v.suspected, v.is_new) for v in verdicts[1:]] == [
        (True, True), (False, False), (True, True),
    ]  # fmt: skip


def test_a_fall_within_its_noise_is_none():
    # The error of the mean over 4 captions is about 0.007, that over 64 0.002.
    for count, is_seen in ((4, False), (64, True)):
        later = reading(20, count=count, reward=1.3, held_out=1.985)
        assert bool(judge(reading(0, count=count), later)[-1].reasons) == is_seen


def test_a_fall_too_small_to_matter_is_none():
    chosen = HackingSettings(patience=1, min_fall=0.5)
    verdicts = judge(reading(0), reading(20, reward=1.3, held_out=1.96), rule=HackingRule(chosen))
    assert verdicts[-1].reasons == ()


def test_without_values_of_images_every_difference_counts():
    start, later = Reading(0, START), Reading(20, START | {REWARD: 1.001, HELD_OUT: 1.999})
    assert "has fallen" in judge(start, later)[-1].reasons[0]


def test_what_was_not_measured_is_not_heard():
    gone = {"high_frequency": 0.9, "lpips_diversity": 0.0, "to_v": 9.0, "sharpness": float("nan")}
    hidden = ("high_frequency", "lpips_diversity", TO_V, HELD_OUT)
    for first, later in ((hidden, ()), ((), hidden)):
        verdict = judge(reading(0, without=first), reading(20, without=later, reward=2.0, **gone))
        assert verdict[-1].reasons == ()
    nothing = judge(Reading(0, {}), Reading(20, {}), Reading(40, {}))
    assert not any(verdict.suspected for verdict in nothing)


def test_parts_of_held_out_rewards_are_no_witnesses():
    part = f"{HELD_OUT}/text_irrelevant"
    path = [reading(0), reading(20, **GOOD)]
    with_part = [Reading(r.step, {**r.values, part: 5.0 - r.step}, r.per_image) for r in path]
    assert judge(*with_part)[-1].reasons == ()


def test_images_of_a_caption_are_one_draw():
    # Twins double the number of images, but not what is known.
    single = [1.0, 2.0, 4.0, 8.0]
    twins = [value for value in single for _ in range(2)]
    for values, size in ((single, 1), (twins, 2)):
        assert Reading(0, {}, {"x": values}, size).of_captions("x") == single
    holed = Reading(0, {}, {"x": [1.0, None, 3.0, 5.0, float("nan"), 2.0]}, 2)
    assert holed.of_captions("x") == [None, 4.0, None]


def test_errors_are_of_paired_differences():
    first, second = [1.0, 2.0, 3.0, None], [0.0, 2.0, 1.0, 9.0]
    assert paired_error(first, second) == pytest.approx(1 / 3**0.5)
    assert paired_error(first, second[:3]) == paired_error([1.0], [2.0]) == 0
    assert spread([1.0, None, 3.0]) == pytest.approx(2**0.5)
    assert spread([1.0]) == spread([]) == 0


def test_a_resumed_run_goes_on_as_the_straight_one():
    held_out = [1.9, 2.4, 2.2, 2.2]
    later = [reading(20 * n, reward=1.3, held_out=h) for n, h in enumerate(held_out, start=1)]
    path = [reading(0), *later]
    straight = judge(*path)
    for stop in range(1, len(path)):
        rule = HackingRule()
        first = judge(*path[:stop], rule=rule)
        state = rule.state_dict()
        judge(*path[stop:], rule=rule)  # what goes on later must not reach the state
        resumed = HackingRule()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert first + judge(*path[stop:], rule=resumed) == straight
    assert straight[-1].suspected


def test_a_step_that_comes_again_counts_once():
    rule = HackingRule()
    bad = reading(20, reward=1.3, held_out=1.9)
    verdicts = judge(reading(0), bad, bad, bad, rule=rule)
    assert not any(verdict.suspected for verdict in verdicts)
    later = reading(40, reward=1.3, held_out=1.9)
    again = judge(later, later, rule=rule)
    assert [(v.suspected, v.is_new) for v in again] == [(True, True), (True, False)]


@pytest.mark.parametrize("changes", [{"patience": 0}, {"max_detail": 1.0}])
def test_thresholds_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError, match="`patience` of at least 1"):
        HackingSettings(**changes)
