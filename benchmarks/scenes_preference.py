"""Preference training on scenes: segment-level against whole-text losses, at equal steps.

    python benchmarks/scenes_preference.py --seeds 0 1 2

Every arm trains ``configs/scenes/preference.yaml`` from one scorer, and is tested on pairs of a
stream that no training uses; a finished run is not made again. A seed decides the training scenes
and their order. Prints the table and writes it to ``benchmarks/results``.

Other losses are arms too; which learn faster shows early:

    python benchmarks/scenes_preference.py --arms all --steps 60 --name scenes_preference_losses
"""

import argparse
import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scene_runs import ROOT, cell, finished, run

CONFIG = "configs/scenes/preference.yaml"
LOSSES = [
    f"{level}{loss}" for loss in ("pairwise", "margin", "contrastive") for level in ("", "segment_")
]


def objective(**weights: float) -> list[str]:
    """Set all weights: layered settings keep what is not named."""
    return ["--model.init_args.objective", json.dumps(dict.fromkeys(LOSSES, 0.0) | weights)]


ARMS: dict[str, list[str]] = {
    "segments": [],
    "whole text": ["--model.init_args.text", "whole"],
    "caption-level losses on means of segments": objective(pairwise=1.0, contrastive=1.0),
    "segment pairwise and contrast": objective(segment_pairwise=1.0, segment_contrastive=1.0),
    "segment contrast alone": objective(segment_contrastive=1.0),
    "segment pairwise alone": objective(segment_pairwise=1.0),
    "pairwise on means alone": objective(pairwise=1.0),
    "segment margin, segment contrast": objective(segment_margin=10.0, segment_contrastive=1.0),
}
MAIN_ARMS = ["segments", "whole text"]
TEST_SEED = 4242
# How a caption becomes one vector, see docs/evaluation.md; the others are read in segments.
OWN = {"whole text": "single"}


def train_and_test(arm: str, seed: int, steps: int, runs: Path, num_pairs: int) -> Path:
    """Train an arm (no steps: the start itself), and write its test tables to the run."""
    run_dir = runs / f"{arm.replace(' ', '_').replace(',', '')}-{seed}-{steps}"
    common = [
        "--config", CONFIG, "--run_dir", str(run_dir), "--seed_everything", str(seed),
        "--trainer.enable_progress_bar", "false", *ARMS.get(arm, []),
    ]  # fmt: skip
    log = runs / f"{run_dir.name}.log"
    if steps and not finished(run_dir, steps):
        scenes = ["--data.init_args.scenes.seed", str(seed), "--trainer.limit_val_batches", "0"]
        options = ["--ckpt_path", "auto", "--trainer.max_steps", str(steps)]
        run(["fit", *common, *options, *scenes], log)
    if not (run_dir / "pair_accuracy.csv").is_file():
        scenes = ["--data.init_args.scenes.seed", str(TEST_SEED)]
        size = ["--data.init_args.scenes.num_val", str(num_pairs)]
        checkpoint = ["--ckpt_path", "auto"] if steps else []
        run(["test", *common, *scenes, *size, *checkpoint], log)
    return run_dir


def figures(run_dir: Path, reading: str) -> dict[str, float]:
    """Read the figures of one run from its test tables."""
    found: dict[str, float] = {}
    for row in read_csv(run_dir / "retrieval.csv"):
        if (row["reading"], row["direction"], row["k"]) == (reading, "text_to_image", "1"):
            found[f"R@1 {row['text_embedding']}"] = float(row["recall"])
    for row in read_csv(run_dir / "pair_accuracy.csv"):
        if row["reading"] == reading and row["text_embedding"] == "C":
            found[f"pairs {row['bucket']}"] = float(row["accuracy"])
    return found


def read_csv(file: Path) -> list[dict[str, str]]:
    """Read a table."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


COLUMNS = {
    "R@1 of 256, C": "R@1 C",
    "R@1 of 256, C_perp": "R@1 C_perp",
    "pairs, fact past 77": "pairs past_77",
    "pairs, fact within 77": "pairs within_77",
}


def table(results: dict[str, list[dict[str, float]]], steps: int, seeds: list[int]) -> str:
    """Write the results as Markdown."""
    seed_names = ", ".join(map(str, seeds))
    lines = [
        f"{steps} steps from the shipped scorer, tested on new long captions;",
        f"mean over seeds {seed_names} (lowest to highest). Chance: 0.004 and 0.5.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for name, runs in results.items():
        cells = [cell([one[key] for one in runs]) for key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train and test all arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=MAIN_ARMS, choices=[*ARMS, "all"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--name", default="scenes_preference", help="Stem of the result files.")
    parser.add_argument("--num-pairs", type=int, default=1024)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "scenes_preference")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, one core each.")
    options = parser.parse_args()
    arms = list(ARMS) if "all" in options.arms else options.arms
    runs = options.runs.resolve()
    start = train_and_test("start", 0, 0, runs, options.num_pairs)
    results = {
        f"start, {name}": [figures(start, reading)]
        for name, reading in (("in segments", "average"), ("whole", "single"))
    }
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (arm, seed): pool.submit(
                train_and_test, arm, seed, options.steps, runs, options.num_pairs
            )
            for seed in options.seeds
            for arm in arms
        }
        for (arm, seed), job in jobs.items():
            found = figures(job.result(), OWN.get(arm, "average"))
            results.setdefault(arm, []).append(found)
            print(arm, seed, {k: found[v] for k, v in COLUMNS.items()}, flush=True)
    text = table(results, options.steps, options.seeds)
    print(text)
    folder = ROOT / "benchmarks" / "results"
    (folder / f"{options.name}.md").write_text(text)
    document = {"steps": options.steps, "seeds": options.seeds, "results": results}
    (folder / f"{options.name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
