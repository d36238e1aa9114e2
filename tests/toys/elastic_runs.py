"""Runs that go on with other numbers of ranks and micro-batches, each time a few steps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from command_client import CommandServer
from resumed_runs import BASE, CONFIGS, PERMISSIONS, callback, scenes
from run_comparison import served

BATCH = 4


@dataclass(frozen=True)
class Leg:
    """Where a part of a run takes place, and how many steps of the whole are done after it."""

    until: int
    world: int = 1
    accumulate: int = 1


@dataclass(frozen=True)
class Elastic:
    """A run of several legs.

    Attributes:
        module: One of ``MODULES``.
        run_dir: The run directory; its shards lie beside it.
        legs: One after the other.
        precision: Of the trainer.
        broken: Functions that break something first.
        trouble: What legs said that did not end well; no leg follows.
    """

    module: str
    run_dir: Path
    legs: Sequence[Leg]
    precision: str = "64-true"
    broken: tuple[str, ...] = ()
    trouble: list[str] = field(default_factory=list)

    def command(self, leg: Leg) -> list[str]:
        many = [f"--trainer.devices={leg.world}", "--trainer.strategy=ddp"]
        callbacks = [
            callback("toy_resume.StepRecorder"),
            callback("toy_house.Stop", at_step=leg.until),
            callback("callbacks.ema.EMA"),
        ]
        return [
            "fit", *PERMISSIONS, *MODULES[self.module](self.run_dir.parent),
            f"--run_dir={self.run_dir}", "--ckpt_path=auto", *(many if leg.world > 1 else []),
            f"--trainer.callbacks={json.dumps(callbacks)}", "--trainer.accelerator=cpu",
            "--trainer.limit_val_batches=0", f"--trainer.precision={self.precision}",
            f"--trainer.accumulate_grad_batches={leg.accumulate}", "--trainer.log_every_n_steps=1",
            f"--trainer.max_steps={self.legs[-1].until}", "--checkpoint.monitor=null",
            "--checkpoint.overwrite=false", f"--data.init_args.global_batch_size={BATCH}",
            "--data.init_args.num_workers=0", "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ]  # fmt: skip


def toy(place: Path) -> list[str]:
    # Without dropout, which a library draws for itself: by rank and micro-batch.
    return [
        "--model=toy_resume.CaptionToy", "--model.init_args.dropout=0", "--seed_everything=7",
        "--data=datamodules.long_caption.LongCaptionDataModule", "--data.init_args.content=caption",
        "--trainer.gradient_clip_val=0.5", scenes(place),
    ]  # fmt: skip


def stage_one(place: Path) -> list[str]:
    return [
        f"--config={CONFIGS / 'quickstart.yaml'}", scenes(place),
        f"--model.init_args.base.init_args={json.dumps(BASE)}",
    ]  # fmt: skip


def reward(place: Path) -> list[str]:
    return [
        f"--config={CONFIGS / 'longsd.yaml'}",
        f"--config={CONFIGS / 'debug' / 'longsd_tiny.yaml'}", scenes(place),
    ]  # fmt: skip


def preference(place: Path) -> list[str]:
    scorer = callback("segalign.scenes.scorers.ScenesScorer", world="2x2", weights="random")
    return [
        f"--config={CONFIGS / 'scenes' / 'preference.yaml'}", scenes(place, pairs=True),
        f"--model.init_args.scorer={json.dumps(scorer)}",
    ]  # fmt: skip


MODULES = {"toy": toy, "stage one": stage_one, "reward": reward, "preference": preference}


def run_together(server: CommandServer, runs: Sequence[Elastic]) -> None:
    """Make the legs of all runs, one of each at a time; what goes wrong is their ``trouble``."""
    for number in range(max(len(run.legs) for run in runs)):
        started = []
        for run in runs:
            if number < len(run.legs) and not run.trouble:
                leg, logs = run.legs[number], run.run_dir.parent / f"{run.run_dir.name}-logs"
                logs.mkdir(exist_ok=True)
                ranks = (
                    server.start_ranks(leg.world, run.command(leg), logs, broken=run.broken)
                    if leg.world > 1
                    else [server.start(run.command(leg), logs / "rank-0.txt", broken=run.broken)]
                )
                started.append((run, leg, logs, ranks))
        for run, leg, logs, ranks in started:
            codes = [server.wait(process) for process in ranks]
            if set(codes) != {0}:
                said = (logs / "rank-0.txt").read_text()[-1500:]
                run.trouble.append(f"{run.module}, {leg} ended with {codes}: {said}")


def steps(run: Elastic) -> dict[int, tuple[list[list[int]], float]]:
    """Join what all ranks have served and lost in each step, in the order of the sequence."""
    found = {}
    first = 0
    for leg in run.legs:
        ranks = [served(run.run_dir, rank) for rank in range(leg.world)]
        for step in range(first, leg.until):
            places = [(step, slot) for slot in range(leg.accumulate)]
            missing = [place for place in places for rank in ranks if place not in rank]
            assert not missing, (run.module, leg, missing)
            parts = [rank[place] for place in places for rank in ranks]
            loss = sum(float.fromhex(part["loss"]) for part in parts) / len(parts)
            found[step] = [row for part in parts for row in part["ids"]], loss
        first = leg.until
    return found
