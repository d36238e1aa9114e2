"""Reward fine-tuning on scenes: truncation strategies and the factor omega, at equal images.

    python benchmarks/scenes_reward.py --seeds 0 1 2

For each seed, stage 1 is stopped after 3 steps, where much is still to be learnt; every arm goes on
from there with ``configs/scenes/reward.yaml``. The checkpoint with the best held-out reward is
scored by the oracle, which nothing is trained on or chosen by. A finished run is not made again.
Prints the tables and writes them to ``benchmarks/results/scenes_reward.{json,md}``.
"""

import argparse
import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from scene_runs import ROOT, cell, finished, run

from segalign.run_directory import newest_checkpoint, read_best
from segalign.scenes.base import ScenesBase
from segalign.scenes.evaluation import score_bundle
from segalign.scenes.samples import make_sample
from segalign.text.settings import TextEncoding

ARMS = {
    "DRTune, omega 0.3": None,
    "DRaFT-1": "draft_1",
    "DRaFT-LV": "draft_lv",
    "AlignProp": "alignprop",
    "ReFL": "refl",
    "DRTune, omega 0": "text_relevant_only",
    "DRTune, omega 1": "no_decomposition",
}
OMEGAS = ("DRTune, omega 0", "DRTune, omega 0.3", "DRTune, omega 1")
TEXT = TextEncoding(kind="segments", token_budget=512, mask_padding=True)
SCORE_STREAM = 2**40 + 5
HELD_OUT = "val/held_out/scorer"


def start(seed: int, steps: int, runs: Path) -> Path:
    """Stop stage 1 early."""
    run_dir = runs / f"start-{seed}-{steps}"
    if not finished(run_dir, steps):
        run(
            [
                "fit", "--config", "configs/scenes/align.yaml", "--run_dir", str(run_dir),
                "--ckpt_path", "auto", "--seed_everything", str(seed),
                "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0",
                "--trainer.enable_progress_bar", "false",
                "--model.init_args.lr_scheduler.init_args.warmup_steps", "2",
            ],
            runs / f"{run_dir.name}.log",
        )  # fmt: skip
    return run_dir


def tune(arm: str, seed: int, start_from: Path, steps: int, runs: Path) -> Path:
    """Fine-tune a start by the reward."""
    name = arm.replace(" ", "_").replace(",", "")
    run_dir = runs / f"{name}-{seed}-{steps}"
    if not finished(run_dir, steps):
        layer = ARMS[arm]
        layers = [] if layer is None else ["--config", f"configs/ablations/{layer}.yaml"]
        run(
            [
                "fit", "--config", "configs/scenes/reward.yaml", *layers,
                "--run_dir", str(run_dir), "--ckpt_path", "auto", "--seed_everything", str(seed),
                "--model.init_args.base.init_args.generator", str(start_from),
                "--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false",
                "--trainer.callbacks", json.dumps([ACCURACY]),
                "--data.init_args.scenes.num_val", "96",
            ],
            runs / f"{run_dir.name}.log",
        )  # fmt: skip
    return run_dir


ACCURACY = {
    "class_path": "callbacks.scene_accuracy.SceneAccuracy",
    "init_args": {"world": "3x3", "num_batches": 3},
}


def score(generator: Path, num_captions: int) -> dict[str, float]:
    """Ask the oracle what new pictures show."""
    samples = [make_sample("3x3", SCORE_STREAM, i, length="long") for i in range(num_captions)]
    return score_bundle(ScenesBase(generator=str(generator)).load(), TEXT, samples).accuracies()


def curve(run_dir: Path) -> list[dict[str, float]]:
    """Read the validations of a run; ``plain`` is the reward without reweighting."""
    with (run_dir / "logs" / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get(HELD_OUT)]
    return [
        {
            "step": float(row["step"]),
            "held_out": float(row[HELD_OUT]),
            "attributes": float(row["val/attributes"]),
            # Runs of earlier versions call it by the other name.
            "reward": float(row.get("val/reward_mean") or row["val/reward"]),
            "text_relevant": float(row["val/reward/text_relevant"]),
            "text_irrelevant": float(row["val/reward/text_irrelevant"]),
        }
        for row in rows
    ]


def at_equal_score(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, float]]:
    """Compare the factors omega where their plain rewards are equal, seed by seed.

    The plain reward is the sum of both parts; its highest value that all arms reach is taken, and
    accuracies are interpolated between validations.
    """
    rows = []
    for runs in zip(*(results[arm] for arm in OMEGAS), strict=True):
        curves = [one["curve"] for one in runs]
        plain = [[p["text_relevant"] + p["text_irrelevant"] for p in points] for points in curves]
        level = min(max(values) for values in plain)
        found = {"plain reward": level}
        for arm, points, values in zip(OMEGAS, curves, plain, strict=True):
            for key in ("attributes", "text_irrelevant", "held_out"):
                series = [point[key] for point in points]
                found[f"{arm}/{key}"] = interpolate(level, values, series)
        rows.append(found)
    return rows


def interpolate(level: float, values: list[float], series: list[float]) -> float:
    """Read a series where values first reach a level."""
    reached = next(i for i, value in enumerate(values) if value >= level)
    if reached == 0:
        return series[0]
    below, above = values[reached - 1], values[reached]
    share = (level - below) / (above - below)
    return series[reached - 1] + share * (series[reached] - series[reached - 1])


COLUMNS = {
    "start": ("start", "attributes"),
    "at the best held-out reward": ("best", "attributes"),
    "gain": ("gain", "attributes"),
    "shapes, gain": ("gain", "shape"),
    "past token 77, gain": ("gain", "attributes/past_77"),
    "at the end": ("last", "attributes"),
}


def tables(results: dict[str, list[dict[str, Any]]], steps: int, seeds: list[int]) -> str:
    """Write the results as Markdown."""
    names = ", ".join(map(str, seeds))
    lines = [
        f"Attribute accuracy of new pictures of long captions, by the oracle; {steps} steps of 32",
        "images from a stage 1 that was stopped after 3 steps, at the checkpoint with the best",
        f"held-out reward; mean over seeds {names} (lowest to highest). All arms have guidance 2",
        "and one learning rate, strategies omega 0.3, and ReFL no hinge.",
        "",
        f"| | {' | '.join(COLUMNS)} | best step |",
        f"|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    for arm, runs in results.items():
        cells = [cell([one[when][key] for one in runs]) for when, key in COLUMNS.values()]
        best = ", ".join(str(one["best_step"]) for one in runs)
        lines.append(f"| {arm} | {' | '.join(cells)} | {best} |")
    if all(arm in results for arm in OMEGAS):
        lines += ["", *omega_table(results)]
    return "\n".join(lines) + "\n"


def omega_table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Write what the factor omega changes at an equal plain reward, on validation captions."""
    rows = at_equal_score(results)
    heading = "| at equal plain reward | attributes | text-irrelevant part | held-out reward |"
    lines = [heading, "|---|---|---|---|"]
    for arm in OMEGAS:
        keys = ("attributes", "text_irrelevant", "held_out")
        cells = [cell([row[f"{arm}/{key}"] for row in rows]) for key in keys]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def measure(run_dir: Path, before: dict[str, float], num_captions: int) -> dict[str, Any]:
    """Score a run at its best checkpoint, and at its last."""
    best = read_best(run_dir)
    assert best is not None
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    after = score(run_dir / "checkpoints" / "best", num_captions)
    return {
        "start": before,
        "best": after,
        "last": score(newest, num_captions),
        "gain": {key: after[key] - before[key] for key in before},
        "best_step": best.step,
        "curve": curve(run_dir),
    }


def main() -> None:
    """Train and score all arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--start-steps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--num-captions", type=int, default=256)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "scenes_reward")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, one core each.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = options.runs.resolve()
    results: dict[str, list[dict[str, Any]]] = {}
    starts = {seed: start(seed, options.start_steps, runs) for seed in options.seeds}
    before = {seed: score(one, options.num_captions) for seed, one in starts.items()}
    print({seed: round(found["attributes"], 3) for seed, found in before.items()}, flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (arm, seed): pool.submit(tune, arm, seed, starts[seed], options.steps, runs)
            for seed in options.seeds
            for arm in options.arms
        }
        for (arm, seed), job in jobs.items():
            found = measure(job.result(), before[seed], options.num_captions)
            results.setdefault(arm, []).append(found)
            figures = {key: round(found[key]["attributes"], 3) for key in ("start", "best", "last")}
            print(arm, seed, figures, found["best_step"], flush=True)
    text = tables(results, options.steps, options.seeds)
    print(text)
    folder = ROOT / "benchmarks" / "results"
    (folder / "scenes_reward.md").write_text(text)
    document = {"steps": options.steps, "seeds": options.seeds, "results": results}
    (folder / "scenes_reward.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
