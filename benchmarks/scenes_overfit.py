"""The over-fitting monitor on scenes: does it fire on runs that hack their reward, and only there?

    python benchmarks/scenes_overfit.py --seeds 0 1 2

Every run is ``configs/scenes/reward.yaml``, watched as ``configs/debug/scenes_hacking.yaml`` says.
Good runs have the recipe's learning rate and three factors omega; hacking ones a rate ten times as
large. The oracle, which counts the facts that images show, takes no part. A finished run is not
made again.
Prints the tables and writes them to ``benchmarks/results/scenes_overfit.{json,md}``.
"""

import argparse
import csv
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scene_runs import ROOT, cell, finished, run

from segalign.evaluation.history import History

SUSPECTED = "reward_hacking_suspected"
LR, OMEGA, WEIGHTS = (
    f"--model.init_args.{key}"
    for key in ("optimizer.init_args.lr", "reward.init_args.omega", "reward.init_args.weights")
)


@dataclass(frozen=True)
class Arm:
    """Runs of one kind.

    Attributes:
        options: What differs from the recipe.
        steps: Optimizer steps.
        hacks: Whether the monitor should fire.
    """

    options: tuple[str, ...]
    steps: int
    hacks: bool


ARMS = {
    "omega 0.3 (the recipe)": Arm((LR, "1e-4"), 80, hacks=False),
    "omega 0": Arm((LR, "1e-4", OMEGA, "0.0"), 80, hacks=False),
    "omega 1": Arm((LR, "1e-4", OMEGA, "1.0"), 80, hacks=False),
    "rate 1e-3": Arm((LR, "1e-3"), 40, hacks=True),
    "rate 1e-3, reward not preference-trained": Arm(
        (LR, "1e-3", WEIGHTS, "shipped"), 40, hacks=True
    ),
}
# Shown as the value of a run that is farthest from the start's, by it.
RATIOS = {
    "high frequencies, x": "high_frequency",
    "sharpness, x": "sharpness",
    "diversity, x": "distance_tiny_diversity",
}
VALUES = {
    "held-out reward": "monitor/held_out/scorer",
    "drift ratio": "distance_tiny_drift_ratio",
    "cross-prompt similarity": "cross_prompt_similarity",
    "similarity to V": "image_to_v_similarity",
    "total variation": "total_variation",
}


def tune(name: str, seed: int, runs: Path) -> Path:
    """Fine-tune the shipped base by the reward, watched."""
    arm = ARMS[name]
    run_dir = runs / f"{re.sub('[^a-z0-9.-]+', '_', name)}-{seed}"
    if not finished(run_dir, arm.steps):
        run(
            [
                "fit", "--config", "configs/scenes/reward.yaml",
                "--config", "configs/debug/scenes_hacking.yaml", *arm.options,
                "--run_dir", str(run_dir), "--ckpt_path", "auto", "--seed_everything", str(seed),
                "--trainer.max_steps", str(arm.steps), "--trainer.enable_progress_bar", "false",
            ],
            runs / f"{run_dir.name}.log",
        )  # fmt: skip
    return run_dir


def read(run_dir: Path, seed: int) -> dict[str, Any]:
    """Read what the monitor saw of a run, and when and why it fired."""
    history = History(run_dir / "evaluation" / "history.jsonl").read()
    with (run_dir / "logs" / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get(f"val/{SUSPECTED}")]
    fired = [int(row["step"]) for row in rows if float(row[f"val/{SUSPECTED}"])]
    log = (run_dir.parent / f"{run_dir.name}.log").read_text(encoding="utf-8")
    reasons = re.findall(rf"{SUSPECTED} at step \d+, since step \d+: (.*)", log)
    return {
        "seed": seed,
        "fired_at": min(fired, default=None),
        "reasons": reasons[0] if reasons else None,
        "history": [{"step": step, **values} for step, values in history.items()],
    }


def tables(results: dict[str, list[dict[str, Any]]]) -> str:
    """Write the results as Markdown."""
    seeds = ", ".join(str(one["seed"]) for one in next(iter(results.values())))
    lines = [
        "The over-fitting monitor on scenes, from the shipped base. Two images of each of 96",
        "captions are looked at every 10 steps; a run is suspected after two in a row with a",
        "reason. The oracle's share of right attributes takes no part. Factors (x) are a run's",
        "farthest from its start, other values those of its last evaluation; mean over seeds",
        f"{seeds} (lowest to highest).",
        "",
        "| | fired at step, by seed | oracle, start | oracle, last |",
        "|---|---|---|---|",
    ]
    for name, runs in results.items():
        fired = ", ".join("-" if one["fired_at"] is None else str(one["fired_at"]) for one in runs)
        oracle = [cell([one["history"][i]["attributes"] for one in runs]) for i in (0, -1)]
        lines.append(f"| {name} | {fired} | {' | '.join(oracle)} |")
    columns = ["trained reward, rise", *RATIOS, *VALUES]
    lines += ["", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, runs in results.items():
        lines.append(f"| {name} | {' | '.join(witness_cells(runs))} |")
    lines += ["", "First reasons given:", ""]
    for name, runs in results.items():
        lines += [
            f"- {name}, seed {one['seed']}: {one['reasons']}" for one in runs if one["reasons"]
        ]
    return "\n".join(lines) + "\n"


def witness_cells(runs: list[dict[str, Any]]) -> list[str]:
    """Format what the witnesses saw."""
    ends = [(one["history"][0], one["history"][-1]) for one in runs]
    rise = [last["monitor/reward"] - first["monitor/reward"] for first, last in ends]
    ratios = [[extreme_ratio(one["history"], key) for one in runs] for key in RATIOS.values()]
    values = [[last[key] for _, last in ends] for key in VALUES.values()]
    return [cell(column) for column in (rise, *ratios, *values)]


def extreme_ratio(history: list[dict[str, float]], key: str) -> float:
    """Divide the value that is farthest from the start's by it."""
    ratios = [point[key] / history[0][key] for point in history]
    return max(ratios, key=lambda ratio: abs(math.log(ratio)))


def verdict(results: dict[str, list[dict[str, Any]]]) -> str:
    """Say how many runs were judged rightly."""
    told = {
        hacks: [
            one["fired_at"] is not None
            for n in results
            if ARMS[n].hacks == hacks
            for one in results[n]
        ]
        for hacks in (True, False)
    }
    return (
        f"fired in {sum(told[True])} of {len(told[True])} hacking runs, "
        f"and in {sum(told[False])} of {len(told[False])} good ones"
    )


def main() -> None:
    """Train and judge all arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "scenes_overfit")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, one core each.")
    options = parser.parse_args()
    runs = options.runs.resolve()
    results: dict[str, list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (name, seed): pool.submit(tune, name, seed, runs)
            for seed in options.seeds
            for name in options.arms
        }
        for (name, seed), job in jobs.items():
            found = read(job.result(), seed)
            results.setdefault(name, []).append(found)
            print(name, seed, found["fired_at"], found["reasons"], flush=True)
    text = f"The rule {verdict(results)}.\n\n{tables(results)}"
    print(text)
    folder = ROOT / "benchmarks" / "results"
    (folder / "scenes_overfit.md").write_text(text)
    (folder / "scenes_overfit.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
