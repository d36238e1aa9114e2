"""A run in which nothing moves ends on all ranks, and every rank has written where it stands."""

import re
import time
from dataclasses import dataclass

import psutil
import pytest
from rank_runs import RankRuns, family, lives, num_batches

from segalign.hang_watcher import HANG_EXIT_CODE

SECONDS = 3
LONGEST_ATTEMPT = 90.0  # seconds
BY_TIMER = 1  # the exit code where the interpreter is held
IN_DDP = "torch/nn/parallel/distributed.py"


@dataclass(frozen=True)
class Case:
    """What hangs, the exit code of rank 1, and what the stacks of rank 0 and of rank 1 name."""

    options: list[str]
    stack_0: str
    stack_1: str
    code_1: int = HANG_EXIT_CODE


def hanging(kind: str, at_step: int, callback: str = "Hang") -> list[str]:
    arguments = f"{{kind: {kind}, at_step: {at_step}}}"
    return [
        f"--trainer.callbacks+=toy_hangs.{callback}",
        f"--trainer.callbacks.init_args={arguments}",
    ]


CASES = {
    "alone": Case(hanging("alone", 2), "in work_for_ever", "in sleep_for_ever"),
    "collective": Case(hanging("collective", 2), IN_DDP, "in join_a_collective_alone"),
    "interpreter": Case(hanging("interpreter", 2), IN_DDP, "in hold_the_interpreter", BY_TIMER),
    "worker": Case(["--data=toy_hangs.StuckData"], IN_DDP, "in sleep_for_ever"),
}
NIGHTLY = {
    # No gradient was ever exchanged.
    "sleep": Case(hanging("sleep", 0), "in _engine_run_backward", "in sleep_for_ever"),
    "validation": Case(hanging("sleep", 4, "HangInValidation"), IN_DDP, "in sleep_for_ever"),
}


@pytest.fixture
def runs(server, toy_config, tmp_path):
    """Start runs in folders of their own."""
    return lambda name: RankRuns(server, toy_config, tmp_path / name)


def check_hangs(runs, cases, broken=(), longest=LONGEST_ATTEMPT):
    """Let several runs hang at the same time, which costs no more time than one of them."""
    started = {}
    for name, case in cases.items():
        fits = runs(name)
        seconds = f"--hang_watch.seconds={SECONDS}"
        heads = fits.start(fits.folder / "run", seconds, *case.options, broken=broken)
        started[name] = fits, heads
    ended = watch({head for _, heads in started.values() for head in heads}, longest)
    for name, (fits, heads) in started.items():
        # All have ended, or were killed; it may take a moment until the last thread has.
        codes = [fits.server.wait(head, 5) for head in heads]
        check_one(name, cases[name], fits, codes)
    assert ended == [], f"{len(ended)} processes are left"


def check_one(name, case, fits, codes):
    tale = f"{name}: {codes}, {fits.said()}"
    assert codes == [HANG_EXIT_CODE, case.code_1], tale
    paths = sorted((fits.folder / "run" / "logs").glob("hang-rank-*.txt"))
    assert len(paths) == 2, tale
    assert case.stack_0 in paths[0].read_text(), tale
    assert case.stack_1 in paths[1].read_text(), tale
    (line,) = re.findall("^error: .*$", (fits.logs / "rank-0.txt").read_text(), re.MULTILINE)
    assert line.startswith(f"error: expected the run to move within {SECONDS} s; on rank "), line
    assert f"the stacks of 2 of 2 ranks are in `{paths[0].parent}/hang-rank-*.txt`" in line, line


def watch(heads: set[int], longest: float) -> list[psutil.Process]:
    """Wait for the ends of processes; returns those, or what they have started, that go on."""
    seen: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + longest
    while time.monotonic() < deadline:
        seen |= {process.pid: process for process in family(sorted(heads))}
        if not any(lives(seen[head]) for head in heads):
            break
        time.sleep(0.05)
    left = [process for process in seen.values() if lives(process)]
    for process in left:
        process.kill()
    return left


def test_hangs_end_both_ranks_and_leave_their_stacks(runs, is_nightly):
    check_hangs(runs, CASES)
    if is_nightly:
        check_hangs(runs, NIGHTLY)


def check_slow_work(runs, broken=()):
    """Run steps that take as long, all together and in one hook, as nothing may move."""
    fits = runs("slow")
    slow = [
        "--trainer.max_steps=6",
        "--trainer.callbacks+=toy_hangs.Slow",
        "--trainer.callbacks.init_args={seconds: 0.5, hook_seconds: 4}",
    ]
    codes = fits.run(fits.folder / "run", "--hang_watch.seconds=2", *slow, broken=broken)
    assert codes == [0, 0], fits.said()
    assert list((fits.folder / "run" / "logs").glob("hang*")) == []


def test_slow_work_is_left_alone(runs):
    check_slow_work(runs)


NOTE = '{"attempt": "another", "rank": 0, "seconds": 2, "since": "then"}'


def test_what_an_earlier_hang_has_left_ends_no_other_attempt(runs):
    fits = runs("stale")
    logs = fits.folder / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "hang.json").write_text(NOTE)
    for rank in range(3):
        (logs / f"hang-rank-{rank}.txt").write_text("stacks")
    assert fits.run(logs.parent, "--hang_watch.seconds=10") == [0, 0], fits.said()
    assert list(logs.glob("hang*")) == []


def check_other_attempts(runs, broken=()):
    """Let another attempt note in the same folder, while both ranks work, that it hangs."""
    fits = runs("other")
    run_dir = fits.folder / "run"
    slow = [
        "--trainer.max_steps=6",
        "--trainer.callbacks+=toy_hangs.Slow",
        "--trainer.callbacks.init_args={seconds: 0.3, hook_seconds: 0}",
    ]
    heads = fits.start(run_dir, "--hang_watch.seconds=4", *slow, broken=broken)
    deadline = time.monotonic() + LONGEST_ATTEMPT
    while min(num_batches(run_dir, 0), num_batches(run_dir, 1)) < 1:
        assert time.monotonic() < deadline, fits.said()
        time.sleep(0.01)
    (run_dir / "logs" / "hang.json").write_text(NOTE)
    codes = [fits.server.wait(head, LONGEST_ATTEMPT) for head in heads]
    assert codes == [0, 0], fits.said()
    assert (run_dir / "logs" / "hang.json").read_text() == NOTE


def test_another_attempt_that_hangs_ends_no_run(runs):
    check_other_attempts(runs)


# What breaks the watch, and what finds that.
BROKEN = {
    "broken_hangs.dumps_its_own_rank_alone": "alone",
    "broken_hangs.ends_as_if_all_were_well": "collective",
    "broken_hangs.never_dumps": "collective",
    "broken_hangs.takes_polling_for_work": "worker",
    "broken_hangs.needs_the_interpreter": "interpreter",
    "broken_hangs.leaves_workers": "worker",
    "broken_hangs.watches_batches_alone": "slow work",
    "broken_hangs.believes_every_attempt": "other attempts",
}


@pytest.mark.parametrize("variant", BROKEN)
def test_a_broken_watch_is_caught(runs, variant, is_nightly):
    if not is_nightly:
        pytest.skip("about 6 to 15 s each")
    name = BROKEN[variant]
    with pytest.raises(AssertionError):
        check_broken(runs, name, variant)


def check_broken(runs, name, variant):
    if name == "slow work":
        check_slow_work(runs, (variant,))
    elif name == "other attempts":
        check_other_attempts(runs, (variant,))
    else:
        check_hangs(runs, {name: CASES[name]}, (variant,), longest=15.0)
