"""Runs of every module that are killed again and again, side by side with undisturbed ones."""

import json
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_client import CommandServer
from resumed_runs import callback, command
from run_comparison import lines
from toy_resume import KINDS

from segalign.run_directory import checkpoint_step, newest_checkpoint


@dataclass
class Chain:
    """One module: a run that nothing disturbs, and a run of several attempts.

    Attributes:
        module: One of ``resumed_runs.MODULES``.
        place: Folder of both.
        wanted: Kinds of the moments to be killed at, in order; or such moments themselves.
        name: Of the folders; None is the module.
        broken: Functions that break something first, in both runs.
        moments: Moments it was killed at.
        trouble: What did not end as it should.
    """

    module: str
    place: Path
    wanted: list[str | dict[str, Any]]
    name: str | None = None
    broken: tuple[str, ...] = ()
    moments: list[dict[str, Any]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    @property
    def straight(self) -> Path:
        return self.place / f"{self.name or self.module}, straight"

    @property
    def killed(self) -> Path:
        return self.place / f"{self.name or self.module}, killed"

    def draw(self, chance: random.Random) -> dict[str, Any]:
        """Draw the next moment to be killed at, after the newest checkpoint."""
        kind = self.wanted[len(self.moments)]
        if isinstance(kind, dict):
            return kind
        newest = newest_checkpoint(self.killed)
        first = 0 if newest is None else checkpoint_step(newest) + 1
        left = len(self.wanted) - len(self.moments)
        moments = lines(self.straight / "moments.jsonl")
        last = first + -(-(moments[-1]["step"] - first) // left) if left > 1 else 10**9
        for names in (KINDS[kind], KINDS["step"], KINDS["start"]):
            found = [
                moment
                for moment in moments
                if moment["name"] in names
                and (first <= moment["step"] <= last or names == KINDS["start"])
            ]
            if found:
                moment = chance.choice(found)
                return moment if names != KINDS["start"] else {**moment, "step": None}
        raise AssertionError(f"{self} has no moment left")

    def options(self, moment: dict[str, Any]) -> list[str]:
        return command(
            self.module, self.place, self.killed, callback("toy_resume.Moments", **moment)
        )

    def repeat(self) -> str:
        """Say how to see it again."""
        told = [json.dumps(moment) for moment in self.moments]
        return f"{self.module}: killed at {', '.join(told)}; {' '.join(self.trouble)}"


def run_chains(server: CommandServer, chains: list[Chain], chance: random.Random) -> None:
    """Run all chains, an attempt of each at a time; what goes wrong is their ``trouble``."""
    noting = callback("toy_resume.Moments")
    _together(server, 0, [(c, command(c.module, c.place, c.straight, noting)) for c in chains])
    while active := [c for c in chains if len(c.moments) < len(c.wanted) and not c.trouble]:
        for chain in active:
            chain.moments.append(chain.draw(chance))
        _together(server, -signal.SIGKILL, [(c, c.options(c.moments[-1])) for c in active])
    sound = [c for c in chains if not c.trouble]
    _together(server, 0, [(c, command(c.module, c.place, c.killed)) for c in sound])


def _together(
    server: CommandServer, expected: int, commands: list[tuple[Chain, list[str]]]
) -> None:
    started = []
    for chain, arguments in commands:
        log = chain.place / f"{chain.name or chain.module}.txt"
        started.append((chain, log, server.start(arguments, log, broken=chain.broken)))
    for chain, log, process in started:
        code = server.wait(process)
        if code != expected:
            said = log.read_text()[-1500:]
            chain.trouble.append(f"ended with {code} instead of {expected}: {said}")
