"""SIGKILL of one of two ranks ends both within 20 s, and the resumed run changes nothing."""

import itertools
import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import broken_rank_death
import pytest
from rank_runs import RankRuns, assert_same_ranks, family, lives

from segalign.run_directory import newest_checkpoint, stored_step

LONGEST_END = 20.0  # seconds from the death of a rank to the end of all processes
LONGEST_ATTEMPT = 60.0  # seconds


@pytest.fixture
def runs(server, toy_config, tmp_path):
    return RankRuns(server, toy_config, tmp_path)


@dataclass(frozen=True)
class Kill:
    """Which rank is killed, when, and whether Lightning's launcher has started rank 1."""

    victim: int
    moment: str  # step, save, validation
    is_launched: bool
    has_workers: bool = False

    def options(self, draw: random.Random, run_dir: Path) -> list[str]:
        """Choose the moment in a run that goes on from its newest checkpoint."""
        kind = "toy_signals.WorkerData" if self.has_workers else "toy_house.ToyData"
        data = [f"--data={kind}", "--data.init_args.seed=7"]
        return [*data, *self._death(draw, run_dir)]

    def _death(self, draw: random.Random, run_dir: Path) -> list[str]:
        newest = newest_checkpoint(run_dir)
        start = 0 if newest is None else stored_step(newest)
        if self.moment == "save" and self.victim == 0:  # which alone writes
            at_sync = draw.randint(1, 17)
            return ["--trainer.callbacks+=toy_house.KillWhileSaving",
                    f"--trainer.callbacks.init_args.at_sync={at_sync}"]  # fmt: skip
        every = {"step": 1, "save": 5, "validation": 4}[self.moment]
        longest = 9 if self.moment == "step" else 1
        at_step = (start // every + draw.randint(1, longest)) * every
        arguments = {"number": int(signal.SIGKILL), "at_step": at_step, "moment": self.moment}
        arguments["rank"] = self.victim
        return ["--trainer.callbacks+=toy_signals.Signal",
                f"--trainer.callbacks.init_args={json.dumps(arguments)}"]  # fmt: skip


# The first few try each rank, each moment, and each way to start.
KILLS = (
    Kill(0, "step", True),
    Kill(1, "save", False),
    Kill(1, "validation", True),
    Kill(0, "save", False),
    Kill(1, "step", False, has_workers=True),
    *itertools.starmap(Kill, itertools.product((0, 1), ("step", "validation"), (False,))),
    *itertools.starmap(Kill, itertools.product((0, 1), ("save", "validation"), (True,))),
    Kill(1, "step", True),
)


def codes_after_death(runs: RankRuns, heads: list[int], longest_end: float) -> list[int]:
    """Wait for the ends of all processes of a run, of which one dies; returns those of heads."""
    started = time.monotonic()
    seen = {process.pid: process for process in family(heads)}
    died = None
    while is_alive := [process.pid for process in seen.values() if lives(process)]:
        now = time.monotonic()
        if died is None:
            seen |= {process.pid: process for process in family(heads)}
            died = now if len(is_alive) < len(seen) else None
        if now - (died or now) > longest_end or now - started > LONGEST_ATTEMPT:
            break
        time.sleep(0.02)
    left = [process for process in seen.values() if lives(process)]
    for process in left:
        process.kill()
    codes = [runs.server.wait(head) for head in heads]
    took = time.monotonic() - (died or started)
    assert not left, (
        f"{len(left)} of {len(seen)} processes lived on for {took:.0f} s: {runs.said()}"
    )
    return codes


@pytest.fixture(scope="module")
def straight(server, toy_config, tmp_path_factory):
    """Run both ranks without an interruption, once for each length."""
    done: dict[int, Path] = {}

    def run(max_steps: int) -> Path:
        if max_steps not in done:
            folder = tmp_path_factory.mktemp("straight")
            runs = RankRuns(server, toy_config, folder)
            codes = runs.run(folder / "run", f"--trainer.max_steps={max_steps}")
            assert codes == [0, 0], runs.said()
            done[max_steps] = folder / "run"
        return done[max_steps]

    return run


def check_deaths(runs, straight, kills, seed, broken=()):
    draw, run_dir = random.Random(seed), runs.folder / "run"
    # Some attempts have workers, and others none.
    length = [f"--trainer.max_steps={13 * len(kills) + 5}", "--checkpoint.allow_changes=[data]"]
    for number, kill in enumerate(kills):
        options = [*length, *kill.options(draw, run_dir)]
        heads = runs.start(run_dir, *options, is_launched=kill.is_launched, broken=broken)
        codes = codes_after_death(runs, heads, LONGEST_END)
        tale = f"seed {seed}, kill {number}: {kill}, {options}, codes {codes}: {runs.said()}"
        assert 0 not in codes, tale
        assert kill.is_launched or codes[kill.victim] == -signal.SIGKILL, tale
    assert runs.run(run_dir, *length, broken=broken) == [0, 0], runs.said()
    in_saves = sum(kill.moment == "save" and kill.victim == 0 for kill in kills)
    assert_same_ranks(run_dir, straight(13 * len(kills) + 5), missing_rows=in_saves)


def test_the_death_of_a_rank_ends_both_and_changes_nothing(runs, straight, tries, seed):
    kills = itertools.islice(itertools.cycle(KILLS), tries(4, 30))
    check_deaths(runs, straight, list(kills), seed)


def check_busy(runs, broken=(), longest_end=LONGEST_END):
    """Kill the launching rank while the other one works without asking anybody."""
    run_dir = runs.folder / "run"
    busy = ["--trainer.callbacks+=toy_hangs.Hang",
            "--trainer.callbacks.init_args={kind: sleep, rank: 1, at_step: 1}"]  # fmt: skip
    heads = runs.start(
        run_dir, "--hang_watch.seconds=30", *busy, is_launched=True,
        broken=("rank_runs.orphans_end_soon", *broken),
    )  # fmt: skip
    deadline = time.monotonic() + LONGEST_ATTEMPT
    while not (run_dir / "hangs").exists():
        assert time.monotonic() < deadline, runs.said()
        time.sleep(0.01)
    assert len(family(heads)) == 2
    os.kill(heads[0], signal.SIGKILL)
    assert codes_after_death(runs, heads, longest_end) == [-signal.SIGKILL]


def test_a_busy_rank_does_not_outlive_the_one_that_started_it(runs):
    check_busy(runs)


@pytest.mark.parametrize("variant", broken_rank_death.BUSY)
def test_the_end_of_a_busy_rank_is_caught_broken(runs, variant, is_nightly):
    if not is_nightly:
        pytest.skip("about 8 s")
    with pytest.raises(AssertionError, match="lived on"):
        check_busy(runs, (variant,), longest_end=6.0)


@pytest.mark.parametrize("variant", broken_rank_death.RESUMED)
def test_a_resumed_run_is_caught_broken(runs, straight, seed, variant, is_nightly):
    if not is_nightly:
        pytest.skip("about 8 s each")
    with pytest.raises(AssertionError, match=broken_rank_death.RESUMED[variant]):
        check_deaths(runs, straight, [Kill(1, "step", False)], seed, (variant,))


BROKEN = (*broken_rank_death.BUSY, *broken_rank_death.RESUMED)
