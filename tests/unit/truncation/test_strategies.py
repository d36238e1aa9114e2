from collections import Counter
from statistics import NormalDist

import pytest
import torch
from jsonargparse import ArgumentParser

from segalign.errors import ConfigError
from segalign.truncation.alignprop import AlignProp
from segalign.truncation.draft import DRaFT, DRaFTLV, FullBackpropagation
from segalign.truncation.drtune import DRTune, LongAlign
from segalign.truncation.plan import TruncationPlan, TruncationStrategy
from segalign.truncation.refl import ReFL

DRAWS = 4000
LIKELY = 1e-4  # p-value below which counts do not come from the distribution; draws are fixed

STRATEGIES = [
    DRTune(num_train_steps=3, early_stop=4),
    DRTune(num_train_steps=1, early_stop=9),
    LongAlign(),
    DRaFT(num_train_steps=4),
    DRaFTLV(),
    AlignProp(),
    AlignProp(start="uniform"),
    ReFL(first_step=6, last_step=9),
    FullBackpropagation(),
]


def p_value(found, expected=None):
    """Pearson's chi-square test; expected counts are equal if none are given."""
    found = torch.tensor(list(found), dtype=torch.float64)
    if expected is None:
        expected = found.mean().expand(len(found))
    else:
        expected = torch.tensor(expected, dtype=torch.float64)
    statistic = ((found - expected).square() / expected).sum()
    half_freedom = torch.tensor((len(found) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, statistic / 2).item()


def plans(strategy, num_steps, count=DRAWS):
    return [strategy.plan(num_steps, 11, step) for step in range(count)]


@pytest.mark.parametrize(("num_steps", "k"), [(50, 5), (50, 1), (50, 50), (10, 3), (10, 4), (7, 5)])
def test_drtune_offsets_are_uniform_and_reach_every_step(num_steps, k):
    stride = num_steps // k
    num_offsets = num_steps - (k - 1) * stride
    drawn = [plan.train_steps for plan in plans(DRTune(num_train_steps=k), num_steps)]
    offsets = Counter(steps[0] for steps in drawn)
    assert set(offsets) == set(range(num_offsets))
    if num_offsets > 1:
        assert p_value(offsets.values()) > LIKELY
    assert set(drawn) == {
        tuple(offset + i * stride for i in range(k)) for offset in range(num_offsets)
    }
    assert {index for steps in drawn for index in steps} == set(range(num_steps))


def test_long_align_trains_the_official_steps():
    drawn = {plan.train_steps for plan in plans(LongAlign(), 50)}
    assert drawn == {tuple(range(offset, 50, 10)) for offset in range(10)}
    plan = LongAlign().plan(50, 0, 0)
    assert plan.detach_input
    assert plan.scores_final


def test_early_stop_is_uniform_over_the_last_steps():
    drawn = plans(DRTune(num_train_steps=5, early_stop=20), 50)
    stops = Counter(plan.last_step for plan in drawn)
    assert set(stops) == set(range(30, 50))
    assert p_value(stops.values()) > LIKELY
    for plan in drawn:
        whole = range(plan.train_steps[0], 50, 10)
        assert plan.train_steps == tuple(index for index in whole if index <= plan.last_step)
    assert {index for plan in drawn for index in plan.train_steps} == set(range(50))


def test_an_early_stop_leaves_a_trained_step_however_early():
    drawn = plans(DRTune(num_train_steps=1, early_stop=9), 10)
    assert {index for plan in drawn for index in plan.train_steps} == set(range(10))
    stopped = Counter(plan.train_steps[0] for plan in drawn if plan.last_step == 4)
    assert set(stopped) == set(range(5))
    assert p_value(stopped.values()) > LIKELY


@pytest.mark.parametrize("num_steps", [50, 20])
def test_alignprop_starts_as_the_official_code_does(num_steps):
    """The floor of a normal draw, taken again until it lies in 1..N-1."""
    drawn = Counter(plan.train_steps[0] for plan in plans(AlignProp(), num_steps))
    normal = NormalDist(0.84 * num_steps, 0.1 * num_steps)
    inside = normal.cdf(num_steps) - normal.cdf(1)
    often = [r for r in range(1, num_steps) if normal.cdf(r + 1) - normal.cdf(r) > 0.004]
    expected = [DRAWS * (normal.cdf(r + 1) - normal.cdf(r)) / inside for r in often]
    found = [drawn[r] for r in often]
    rest = DRAWS - sum(expected), DRAWS - sum(found)
    assert p_value([*found, rest[1]], [*expected, rest[0]]) > LIKELY
    assert all(1 <= r < num_steps for r in drawn)


def test_alignprop_starts_uniformly_or_where_it_is_told():
    drawn = Counter(plan.train_steps for plan in plans(AlignProp(start="uniform"), 10))
    assert set(drawn) == {tuple(range(r, 10)) for r in range(1, 10)}
    assert p_value(drawn.values()) > LIKELY
    assert AlignProp(start="fixed").plan(50, 0, 0).train_steps == (49,)
    assert AlignProp(start="fixed", first_step=47).plan(50, 0, 0).train_steps == (47, 48, 49)


def test_refl_scores_the_step_that_it_trains():
    drawn = plans(ReFL(), 40)
    steps = Counter(plan.last_step for plan in drawn)
    assert set(steps) == set(range(30, 40))
    assert p_value(steps.values()) > LIKELY
    assert all(plan.train_steps == (plan.last_step,) and plan.detach_input for plan in drawn)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_a_draw_depends_on_seed_and_step_alone(strategy):
    """So it is the same for all samples and ranks, and leaves torch's generator alone."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [strategy.plan(10, 3, step) for step in range(50)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert [strategy.plan(10, 3, step) for step in range(50)] == first


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_plans_train_steps_that_run(strategy):
    for plan in plans(strategy, 10, 200):
        assert 0 <= plan.train_steps[0] <= plan.train_steps[-1] <= plan.last_step < 10


@pytest.mark.parametrize(
    ("strategy", "replayable"),
    [
        (DRTune(), True),
        (LongAlign(), True),
        (ReFL(first_step=2, last_step=9), True),
        (DRaFT(), True),
        (DRaFTLV(), True),
        (AlignProp(start="fixed"), True),
        (DRaFT(num_train_steps=2), False),
        (AlignProp(start="fixed", first_step=3), False),
        (FullBackpropagation(), False),
    ],
    ids=repr,
)
def test_what_can_be_replayed(strategy, replayable):
    assert strategy.plan(10, 0, 0).replayable is replayable


@pytest.mark.parametrize("strategy", [AlignProp(), AlignProp(start="uniform"), DRaFTLV()], ids=repr)
def test_a_sampler_of_one_step_is_trained(strategy):
    assert strategy.plan(1, 0, 0).train_steps == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DRTune(num_train_steps=0), "`num_train_steps` must be at least 1; got 0"),
        (lambda: DRTune(early_stop=-1), "`early_stop` must be at least 0; got -1"),
        (lambda: DRTune(num_train_steps=11).plan(10, 0, 0), r"must be <= the number .*\(10\); got"),
        (lambda: DRTune(early_stop=10).plan(10, 0, 0), r"`early_stop` must be < .*\(10\); got 10"),
        (lambda: LongAlign().plan(4, 0, 0), r"must be <= the number .*\(4\); got 5"),
        (lambda: DRaFT(num_train_steps=0), "must be at least 1; got 0"),
        (lambda: DRaFT(num_train_steps=11).plan(10, 0, 0), r"must be <= .*\(10\); got 11"),
        (lambda: DRaFTLV(num_renoised=-1), "`num_renoised` must be at least 0"),
        (lambda: DRaFTLV(reduction="max"), "`reduction` must be one of `sum`, `mean`; got 'max'"),
        (lambda: AlignProp(start="late"), "`start` must be one of `gaussian`, .*; got 'late'"),
        (lambda: AlignProp(first_step=3), "`first_step` is for `start: fixed`"),
        (lambda: AlignProp(start="fixed", first_step=10).plan(10, 0, 0), r"< .*\(10\); got 10"),
        (lambda: ReFL(first_step=5, last_step=4), "which trains no step"),
        (lambda: ReFL(first_step=-1), "`first_step` must be at least 0"),
        (lambda: ReFL().plan(25, 0, 0), r"`last_step` must be < .*\(25\); got 39"),
        (lambda: FullBackpropagation().plan(0, 0, 0), "`num_inference_steps` must be at least 1"),
    ],
)
def test_settings_that_cannot_work_say_so_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_steps": ()}, "at least one trained step"),
        ({"train_steps": (3, 2)}, "ascending"),
        ({"train_steps": (2, 9)}, r"up to the last one that runs \(8\); got 9"),
        ({"last_step": 10}, r"last step in 0\.\.9; got 10"),
        ({"train_steps": (2, 8), "detach_input": False}, "all the last steps"),
        ({"num_renoised": 1}, "the last step alone"),
    ],
)
def test_a_plan_that_does_not_fit_says_so(changes, message):
    fitting = {"num_steps": 10, "train_steps": (2, 8), "last_step": 8, "detach_input": True}
    TruncationPlan(**fitting)
    with pytest.raises(ConfigError, match=message):
        TruncationPlan(**fitting | changes)


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("drtune.DRTune", {"num_train_steps": 3, "early_stop": 4, "normalize": True}),
        ("drtune.LongAlign", {"normalize": True}),
        ("draft.DRaFT", {"num_train_steps": 2}),
        ("draft.DRaFTLV", {"num_renoised": 1, "reduction": "mean"}),
        ("draft.FullBackpropagation", {}),
        ("alignprop.AlignProp", {"start": "fixed", "first_step": 4}),
        ("refl.ReFL", {"first_step": 3, "last_step": 5}),
    ],
)
def test_configs_can_name_every_strategy(class_path, arguments):
    parser = ArgumentParser()
    parser.add_argument("--truncation", type=TruncationStrategy)
    setting = {"class_path": f"segalign.truncation.{class_path}", "init_args": arguments}
    strategy = parser.instantiate(parser.parse_object({"truncation": setting})).truncation
    assert {name: getattr(strategy, name) for name in arguments} == arguments
