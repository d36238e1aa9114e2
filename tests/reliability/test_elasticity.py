"""A run may go on with any number of ranks and micro-batches: same samples, same losses."""

from pathlib import Path

import broken_resume
import pytest
from elastic_runs import BATCH, Elastic, Leg, run_together, steps

RANKS = (Leg(2), Leg(3, 2), Leg(4, 4), Leg(6))  # 1 -> 2 -> 4 -> 1, in mid-epoch each time
# Four samples of a step are 1 x 4, 2 x 2, 4 x 1 and 1 x 4 again, ranks by micro-batches.
MICRO = (Leg(3, 1, 4), Leg(5, 2, 2), Leg(8, 4, 1), Leg(11, 1, 4))
RUNS = {
    "toy": ("toy", RANKS, "64-true"),
    "toy, micro-batches": ("toy", MICRO, "64-true"),
    "toy, float32": ("toy", (Leg(12), Leg(25, 2), Leg(38, 4), Leg(50)), "32-true"),
    "stage one": ("stage one", RANKS, "64-true"),
}
TOLERANCE = {"64-true": 1e-9, "32-true": 1e-4}
NIGHTLY = {
    "reward": ("reward", RANKS, "64-true"),
    "preference": ("preference", RANKS, "64-true"),
    "stage one, micro-batches": ("stage one", MICRO, "64-true"),
    "stage one, float32": ("stage one", (Leg(12), Leg(25, 2), Leg(38, 4), Leg(50)), "32-true"),
}
BROKEN = {
    broken_resume.position_counts_own_samples: (Leg(2), Leg(4, 2)),
    broken_resume.noise_keyed_by_row: (Leg(2), Leg(4, 2)),
    # Three micro-batches are no whole step of four.
    broken_resume.micro_batches_counted_on: (Leg(3), Leg(6, 1, 4)),
}
USUAL = broken_resume.position_counts_own_samples  # the others wait for the night
SIDE_BY_SIDE = 3


def pair(place: Path, name: str, module: str, legs, precision: str, broken=()) -> list[Elastic]:
    """Describe the run of one rank and the run of several legs."""
    alone = [Leg(legs[-1].until, 1, legs[0].accumulate)]
    return [
        Elastic(module, place / f"{name}, {kind}", each, precision, broken)
        for kind, each in (("straight", alone), ("legs", legs))
    ]


def check_same_sequence(straight: Elastic, legs: Elastic) -> None:
    assert not straight.trouble + legs.trouble
    wanted, found = steps(straight), steps(legs)
    assert wanted.keys() == found.keys()
    for step, (ids, loss) in wanted.items():
        assert len(ids) == BATCH
        assert found[step][0] == ids, (straight.module, step)
        difference = abs(found[step][1] - loss) / abs(loss)
        assert difference <= TOLERANCE[legs.precision], (straight.module, step, difference)


@pytest.fixture(scope="module")
def made(server, tmp_path_factory, is_nightly) -> dict[str, list[Elastic]]:
    """Make all runs, the legs of all of them side by side."""
    place = tmp_path_factory.mktemp("elastic")
    wanted = RUNS | (NIGHTLY if is_nightly else {})
    pairs = {name: pair(place, name, *settings) for name, settings in wanted.items()}
    pairs |= {
        breaker.__name__: pair(
            place, breaker.__name__, "toy", legs, "64-true", (f"broken_resume.{breaker.__name__}",)
        )
        for breaker, legs in BROKEN.items()
        if is_nightly or breaker is USUAL
    }
    waiting = list(pairs.values())
    while waiting:
        now, waiting = waiting[:SIDE_BY_SIDE], waiting[SIDE_BY_SIDE:]
        run_together(server, [run for runs in now for run in runs])
    return pairs


@pytest.mark.parametrize("name", [*RUNS, *NIGHTLY])
def test_ranks_and_micro_batches_change_nothing(made, name, is_nightly):
    if name in NIGHTLY and not is_nightly:
        pytest.skip("only with --nightly")
    check_same_sequence(*made[name])


@pytest.mark.parametrize("breaker", list(BROKEN), ids=lambda breaker: breaker.__name__)
def test_broken_elasticity_is_caught(made, breaker, is_nightly):
    if breaker is not USUAL and not is_nightly:
        pytest.skip("only with --nightly")
    with pytest.raises(AssertionError):
        check_same_sequence(*made[breaker.__name__])
