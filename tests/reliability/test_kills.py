"""SIGKILL at any moment costs at most the steps since the last checkpoint, and changes nothing."""

import random

import broken_resume
import pytest
from kill_chains import Chain, run_chains
from resumed_runs import EVERY_N_STEPS, MODULES
from run_comparison import assert_same_run, lost_steps
from toy_resume import KINDS

# Moments at which the short run of each module is killed; at night, ten times as many of any kind.
KILLS = {
    "toy": ["start", "save", "step", "validation", "end"],
    "stage one": ["save", "evaluation", "step", "validation"],
    "stage one, LoRA": ["step", "save", "validation"],
    "preference": ["validation", "step", "save"],
    "scorer": ["step", "save", "end"],
    "reward": ["evaluation", "start", "save"],
}
MIDDLE = [kind for kind in KINDS if kind != "end"]
SEED = 1234


@pytest.fixture(scope="module")
def chains(server, tries, tmp_path_factory) -> dict[str, Chain]:
    """Kill runs of all modules, each several times before it is done."""
    found = {}
    for number in range(tries(1, 10)):
        place, chance = tmp_path_factory.mktemp("kills"), random.Random(SEED + number)
        chains = [
            Chain(module, place, kinds if not number else chance.choices(MIDDLE, k=len(kinds)))
            for module, kinds in KILLS.items()
        ]
        run_chains(server, chains, chance)
        found |= {(number, chain.module): chain for chain in chains}
    return found


def check_nothing_changed(chain: Chain) -> None:
    assert not chain.trouble, chain.repeat()
    try:
        assert_same_run(chain.killed, chain.straight)
        lost = lost_steps(chain.killed)
        assert all(0 <= steps <= EVERY_N_STEPS for steps in lost), lost
    except AssertionError as error:
        raise AssertionError(f"{chain.repeat()}\n{error}") from error


@pytest.mark.parametrize("module", list(MODULES))
def test_kills_change_nothing(chains, module):
    for (_, name), chain in chains.items():
        if name == module:
            check_nothing_changed(chain)


def test_kills_fall_into_all_kinds_of_moments(chains):
    moments = [moment["name"] for chain in chains.values() for moment in chain.moments]
    assert len(moments) >= 20
    for kind, names in KINDS.items():
        assert any(name in names for name in moments), (kind, moments)


STEP = [{"name": "batch_end", "step": 5, "time": 0}]
# The rename of the checkpoint of step 6 is over, and its step not even logged by the loop.
SAVED = [{"name": "renamed", "step": 6, "time": 0}]
VALIDATION = [{"name": "validation_batch", "step": 3, "time": 0}]
# Two checkpoints in a row that were resumed after the validation which followed them.
VALIDATED = [{"name": "batch_end", "step": step, "time": 0} for step in (4, 7)]
# All that is noted of the last step is on the disk: its validation, and the end of the training.
ENDED = [{"name": "renamed", "step": 9, "time": 3}]
BROKEN = {
    broken_resume.rng_not_seeded_by_step: STEP,
    broken_resume.data_restarts_the_epoch: STEP,
    broken_resume.optimizer_not_loaded: STEP,
    broken_resume.moments_not_loaded: STEP,
    broken_resume.ema_not_loaded: STEP,
    broken_resume.schedule_not_loaded: STEP,
    broken_resume.validation_not_made_up: VALIDATION,
    broken_resume.step_logged_after_its_checkpoint: SAVED,
    broken_resume.text_totals_logged_at_the_next_step: STEP,
    broken_resume.passes_not_kept: VALIDATED,
    broken_resume.end_noted_before_its_rows: ENDED,
}
# The others wait for the night.
USUAL = (broken_resume.rng_not_seeded_by_step, broken_resume.step_logged_after_its_checkpoint)
MOMENTS = {
    "step": STEP,
    "saved": SAVED,
    "validation": VALIDATION,
    "validated": VALIDATED,
    "ended": ENDED,
}


@pytest.fixture(scope="module")
def spoilt(server, tmp_path_factory, is_nightly) -> dict[str, Chain]:
    """Kill the toy with each broken variant, and with none at the same moments."""
    place = tmp_path_factory.mktemp("spoilt")
    chains = {
        breaker.__name__: Chain(
            "toy", place, moments, breaker.__name__, (f"broken_resume.{breaker.__name__}",)
        )
        for breaker, moments in BROKEN.items()
        if is_nightly or breaker in USUAL
    }
    for name, moments in MOMENTS.items():
        chains[name] = Chain("toy", place, moments, name)
    run_chains(server, list(chains.values()), random.Random(SEED))
    return chains


@pytest.mark.parametrize("name", list(MOMENTS))
def test_one_kill_changes_nothing(spoilt, name):
    check_nothing_changed(spoilt[name])


@pytest.mark.parametrize("breaker", list(BROKEN), ids=lambda breaker: breaker.__name__)
def test_a_broken_resume_is_caught(spoilt, breaker, is_nightly):
    if breaker not in USUAL and not is_nightly:
        pytest.skip("only with --nightly")
    chain = spoilt[breaker.__name__]
    assert not chain.trouble, chain.repeat()
    with pytest.raises(AssertionError):
        check_nothing_changed(chain)
