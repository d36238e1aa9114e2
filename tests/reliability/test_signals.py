"""Signals at random times never block a run: it stops, asks once to come back, and goes on."""

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import broken_signals
import psutil
import pytest
from command_server import NEVER_ENDED
from rank_runs import RankRuns, assert_same_ranks, lives, num_batches

from segalign.run_directory import newest_checkpoint, stored_step

STOPPED, TERMINATED = 85, 143
NUMBERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
MOMENTS = ("loading", "batch", "save", "validation", "twice")
LONGEST_ATTEMPT = 60.0  # seconds; one that takes longer is blocked
KILL_WAIT = 2.0  # seconds that other ranks outlive one that was killed
LONGEST_ADVANCE = 5  # batches


@dataclass(frozen=True)
class Shot:
    """A signal, when it comes, and to which ranks.

    Attributes:
        number: Of the signal.
        moment: One of ``MOMENTS``.
        ranks: Ranks that get it.
        wanted: Batches that this attempt trains before, or so.
        seconds: Between that and the signal.
    """

    number: signal.Signals
    moment: str
    ranks: tuple[int, ...]
    wanted: int
    seconds: float

    @property
    def is_outside(self) -> bool:
        """Whether somebody else sends it, who does not know what the run is doing."""
        return self.moment not in ("save", "validation")

    def options(self, run_dir: Path) -> list[str]:
        listening = [f"--preemption.signal={self.number.name[3:]}"]
        if self.is_outside:
            return listening
        newest = newest_checkpoint(run_dir)
        every = {"save": 5, "validation": 4}[self.moment]
        at_step = ((0 if newest is None else stored_step(newest)) // every + 1) * every
        arguments = {"number": int(self.number), "at_step": at_step, "moment": self.moment}
        arguments["rank"] = self.ranks[0]
        sent = f"--trainer.callbacks.init_args={json.dumps(arguments)}"
        return [*listening, "--trainer.callbacks+=toy_signals.Signal", sent]


def draw_shots(count: int, num_ranks: int, seed: int) -> list[Shot]:
    """Draw signals; every so many of them, all moments have had their turn."""
    draw, shots, moments = random.Random(seed), [], []
    ranks = [(0,)] if num_ranks == 1 else [(0,), (1,), (0, 1)]
    for _ in range(count):
        moments = moments or draw.sample(MOMENTS, len(MOMENTS))
        moment = moments.pop()
        seconds = draw.uniform(0, 0.5 * num_ranks if moment == "loading" else 0.02)
        wanted = 0 if moment == "loading" else draw.randint(1, LONGEST_ADVANCE)
        shots.append(Shot(draw.choice(NUMBERS), moment, draw.choice(ranks), wanted, seconds))
    return shots


class Job:
    """A SLURM job that a run takes itself to be in; notes who asks to be put back."""

    def __init__(self, folder: Path):
        self.log = folder / "asked.txt"
        programs = folder / "programs"
        programs.mkdir()
        # A job that is put back is ended by SIGTERM.
        bodies = {"scontrol": f'echo "$@" >> {self.log}; kill -TERM $PPID', "squeue": "exit 1"}
        for name, body in bodies.items():
            (programs / name).write_text(f"#!/bin/sh\n{body}\n")
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        self.variables = {"PATH": path, "SLURM_JOB_ID": "17"}

    def num_asked(self) -> int:
        asked = self.log.read_text().count("requeue") if self.log.exists() else 0
        self.log.unlink(missing_ok=True)
        return asked


@pytest.fixture
def runs(server, toy_config, tmp_path):
    """Start runs of so many ranks."""
    return lambda num_ranks: RankRuns(server, toy_config, tmp_path, num_ranks)


def shoot(shot: Shot, runs: RankRuns, run_dir: Path, heads: list[int]) -> None:
    """Send a signal from outside when its moment has come, unless the run has ended before."""
    before, deadline = num_batches(run_dir, 0), time.monotonic() + LONGEST_ATTEMPT
    processes = [psutil.Process(head) for head in heads]
    while num_batches(run_dir, 0) < before + shot.wanted and all(map(lives, processes)):
        assert time.monotonic() < deadline, f"blocked before {shot}: {runs.said()}"
        time.sleep(0.002)
    time.sleep(shot.seconds)
    for _ in range(2 if shot.moment == "twice" else 1):
        for rank in shot.ranks:
            os.kill(heads[rank], shot.number)  # also to one that has ended, and is not forgotten


def wait_for(runs: RankRuns, heads: list[int], longest: float) -> list[int]:
    """Wait as ``srun`` does, which kills the other ranks when one was ended by a signal."""
    codes: dict[int, int] = {}
    killed_at = None
    deadline = time.monotonic() + longest
    while len(codes) < len(heads) and time.monotonic() < deadline:
        for head in heads:
            if head not in codes and not lives(psutil.Process(head)):
                codes[head] = runs.server.wait(head)
                killed_at = time.monotonic() if codes[head] < 0 else killed_at
        if killed_at is not None and time.monotonic() - killed_at > KILL_WAIT:
            break
        time.sleep(0.01)
    return [codes[head] if head in codes else end(runs, head, killed_at) for head in heads]


def end(runs: RankRuns, head: int, killed_at: float | None) -> int:
    os.kill(head, signal.SIGKILL)
    runs.server.wait(head)
    assert killed_at is not None, f"blocked: {runs.said()}"
    return -signal.SIGKILL


def check_signals(runs: RankRuns, shots: Sequence[Shot], broken=(), longest=LONGEST_ATTEMPT):
    run_dir, job = runs.folder / "run", Job(runs.folder)
    length = f"--trainer.max_steps={8 * len(shots) + 10}"
    for place, shot in enumerate(shots):
        options = [length, *shot.options(run_dir)]
        heads = runs.start(run_dir, *options, variables=job.variables, broken=broken)
        if shot.is_outside:
            shoot(shot, runs, run_dir, heads)
        codes, asked = wait_for(runs, heads, longest), job.num_asked()
        tale = f"attempt {place}, {shot}: {codes}, asked {asked} times, {runs.said()}"
        by_signal = {code for code in codes if code < 0 or code == TERMINATED}
        assert by_signal <= {-shot.number, TERMINATED, -signal.SIGKILL}, tale
        if by_signal:  # nobody listened yet, or no more
            assert shot.is_outside, tale
        else:
            assert codes in ([STOPPED] * len(heads), [0] * len(heads)), tale
        assert asked == (STOPPED in codes), tale
    assert runs.run(run_dir, length, broken=broken) == [0] * len(heads), runs.said()
    straight = runs.folder / "straight"
    assert runs.run(straight, length) == [0] * len(heads), runs.said()
    assert_same_ranks(run_dir, straight)


@pytest.mark.parametrize(("num_ranks", "usual", "nightly"), [(1, 14, 140), (2, 6, 60)])
def test_signals_at_random_times_block_and_change_nothing(
    runs, tries, seed, num_ranks, usual, nightly
):
    count = tries(usual, nightly)
    check_signals(runs(num_ranks), draw_shots(count, num_ranks, seed))


def check_sigterm(runs, ranks, broken=(), longest=LONGEST_ATTEMPT):
    """End a run by a SIGTERM to which it was not told to listen."""
    run_dir = runs.folder / "run"
    heads = runs.start(run_dir, "--trainer.max_steps=100000", broken=broken)
    shoot(Shot(signal.SIGTERM, "batch", ranks, 5, 0.0), runs, run_dir, heads)
    codes = [runs.server.wait(head, longest) for head in heads]
    assert all(codes[rank] == -signal.SIGTERM for rank in ranks), (codes, runs.said())
    assert not {0, NEVER_ENDED} & {*codes}, (codes, runs.said())


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_a_sigterm_that_nobody_waits_for_ends_all_ranks(runs, ranks):
    check_sigterm(runs(2), ranks)


def test_a_handler_that_talks_to_other_ranks_is_caught(runs, is_nightly):
    if not is_nightly:
        pytest.skip("about 15 s")
    with pytest.raises(AssertionError, match=rf"^\(\[{NEVER_ENDED}, "):
        check_sigterm(runs(2), (1,), ("broken_signals.talks_in_the_handler",), longest=10.0)


STEP = Shot(signal.SIGUSR1, "batch", (0,), 3, 0.0)
VALIDATION = Shot(signal.SIGUSR1, "validation", (0,), 0, 0.0)


@pytest.mark.parametrize("variant", broken_signals.QUICK)
def test_a_broken_request_is_caught(runs, variant):
    with pytest.raises(AssertionError, match=r"asked [02] times"):
        check_signals(runs(1), [STEP], broken=(variant,))


@pytest.mark.parametrize("variant", broken_signals.LONG)
def test_a_broken_stop_is_caught(runs, variant, is_nightly):
    if not is_nightly:
        pytest.skip("about 5 to 10 s each")
    num_ranks, found = broken_signals.LONG[variant]
    with pytest.raises(AssertionError, match=found):
        check_signals(runs(num_ranks), [STEP, VALIDATION], broken=(variant,), longest=10.0)


BROKEN = (*broken_signals.QUICK, *broken_signals.LONG, "broken_signals.talks_in_the_handler")
