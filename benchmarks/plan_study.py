"""How long it takes to plan a study: every run's configs through the parser of runs.

    python benchmarks/plan_study.py --out benchmarks/results/plan_study.md

The runs are those of the reward recipe of scenes in four arms, over a grid of omega and learning
rate, with five seeds, each trained and tested. Goal: 100 runs in 30 s and 1,000 in 3 min, on two
cores. Some configs are also resolved by a parser that remembers nothing, and must be the same.
"""

import argparse
import dataclasses
import importlib
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from segalign.launch.command_lines import put_run_dir, stage_arguments
from segalign.launch.planning import plan_study, prepare_run
from segalign.launch.points import expand
from segalign.launch.study_file import load_study

ROOT = Path(__file__).parents[1]

GOALS = {100: 30.0, 1000: 180.0}
NUM_CHECKED = 8
ABLATIONS = ("k1", "refl", "draft_lv")


def write_study(folder: Path, num_runs: int) -> Path:
    """Write a study of so many runs: 4 arms x 5 rates x 5 seeds x values of omega."""
    num_levels = num_runs // 100
    content = {
        "base": ["configs/scenes/reward.yaml"],
        "arms": {
            "plain": {},
            **{name: {"configs": [f"configs/ablations/{name}.yaml"]} for name in ABLATIONS},
        },
        "grid": {
            "model.init_args.reward.init_args.omega": [
                round(level / 20, 3) for level in range(num_levels)
            ],
            "model.init_args.optimizer.init_args.lr": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
        },
        "seeds": list(range(5)),
        "stages": ["fit", "test"],
        "test": {"settings": {"trainer.limit_test_batches": 4}},
        "runs_folder": str(folder / "runs"),
    }
    path = folder / f"study_{num_runs}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Do something; returns its result, wall-clock seconds, and CPU seconds with workers."""
    start, before = time.perf_counter(), cpu_seconds()
    result = work()
    return result, time.perf_counter() - start, cpu_seconds() - before


def cpu_seconds() -> float:
    """Count the CPU seconds of this process and of its ended workers."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(num_runs: int, folder: Path, opening: tuple[float, float]) -> list[str]:
    """Plan and prepare a study; returns a row of the table."""
    study = load_study(write_study(folder, num_runs))
    resolve = open_parser()
    planned, wall, cpu = timed(lambda: plan_study(study, resolve))
    assert len({run.run_id for run in planned.plan.runs}) == num_runs
    check(study, planned)

    def prepare() -> None:
        for run in planned.plan.runs:
            directory = folder / f"prepared_{num_runs}" / run.run_id
            moved = dataclasses.replace(run, directory=directory)
            prepare_run(moved, planned.configs[run.run_id], study.name)

    _, prepare_wall, _ = timed(prepare)
    # What two cores that do nothing else would take: opening and the first config run on one.
    free = opening[1] + cpu / 2
    met = ["yes" if seconds <= GOALS[num_runs] else "no" for seconds in (opening[0] + wall, free)]
    return [
        f"{num_runs:,}",
        f"{GOALS[num_runs]:.0f} s",
        f"{opening[0] + wall:.0f} s ({met[0]})",
        f"{opening[1] + cpu:.0f} s",
        f"{free:.0f} s ({met[1]})",
        f"{1000 * cpu / num_runs / 2:.0f} ms",
        f"{prepare_wall:.1f} s",
    ]


def open_parser(**settings: bool) -> Any:
    """Open the parser of runs; what it imports is part of what planning costs."""
    main, resolver = map(importlib.import_module, ("main", "lightning_modules.config_resolver"))
    return resolver.ConfigResolver(main.run_parts(), **settings)


def check(study: Any, planned: Any) -> None:
    """Compare some configs with those of a parser that remembers nothing."""
    forgetful = open_parser(remembers=False)
    points = expand(study)
    for index in range(0, len(points), len(points) // NUM_CHECKED):
        run = planned.plan.runs[index]
        for stage in study.stages:
            anew = forgetful(stage, stage_arguments(study, points[index], stage))
            anew["ckpt_path"] = "auto"
            expected = put_run_dir(anew, str(run.directory))
            assert expected == planned.configs[run.run_id][stage], (run, stage)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, nargs="+", default=sorted(GOALS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    _, *opening = timed(open_parser)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(count, Path(folder), (opening[0], opening[1])) for count in options.runs]
    cores = len(os.sched_getaffinity(0))
    text = report(rows, opening[0], cores, load, os.getloadavg()[0])
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def report(rows: list[list[str]], opening: float, cores: int, before: float, after: float) -> str:
    """Write the table."""
    lines = [
        "# What planning a study costs",
        "",
        (
            "Runs of `configs/scenes/reward.yaml` in four arms, each with the stages fit and test: "
            "two configs of a run, all through the parser of runs. "
            f"{cores} cores, shared with other work: the load average was {before:.1f} before and "
            f"{after:.1f} after. Wall-clock times include {opening:.0f} s in which Lightning is "
            "imported and the parser built; CPU times are of all processes; what two free cores "
            "would take is computed from them. On busy cores, CPU times too are longer."
        ),
        "",
        (
            "| runs | goal | wall clock (met?) | CPU | on two free cores (met?) | CPU of a config "
            "| writing run folders |"
        ),
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        (
            f"{NUM_CHECKED} runs of each study were resolved again by a parser that remembers "
            "nothing: the same configs."
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
