"""Stage 1 on scenes: segment encoding against truncation and naive concatenation, equal steps.

    python benchmarks/scenes_stage1.py --seeds 0 1 2

Every arm fine-tunes the shipped base with ``configs/scenes/align.yaml``; a finished run is not made
again. Prints the table and writes it to ``benchmarks/results/scenes_stage1.{json,md}``.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from scene_runs import ROOT, cell, finished, run

from segalign.scenes.base import ScenesBase
from segalign.scenes.evaluation import score_bundle
from segalign.scenes.samples import make_sample
from segalign.text.settings import TextEncoding
from segalign.text.special_tokens import SpecialTokenPolicy

NAIVE = {"end": "keep", "pad": "eos"}
ARMS = {
    "segments": ["--model.init_args.text.kind", "segments"],
    "truncated": ["--model.init_args.text.kind", "truncated"],
    "naive": ["--model.init_args.text.policy", json.dumps(NAIVE)],
}
SCORE_STREAM = 2**40 + 2
LENGTHS = ("short", "long", "very_long")


def encoding(arm: str) -> TextEncoding:
    """Return how an arm reads captions."""
    policy = SpecialTokenPolicy(**NAIVE) if arm == "naive" else SpecialTokenPolicy()
    kind = "truncated" if arm == "truncated" else "segments"
    # Room for captions of 690 words and their start tokens; padding is masked.
    return TextEncoding(kind=kind, policy=policy, token_budget=900, mask_padding=True)


def train(arm: str, seed: int, steps: int, runs: Path) -> Path:
    """Fine-tune the base in a process of its own; resume or skip what is there."""
    run_dir = runs / f"{arm}-{seed}-{steps}"
    if finished(run_dir, steps):
        return run_dir
    command = [
        "fit", "--config", "configs/scenes/align.yaml",
        "--ckpt_path", "auto", "--run_dir", str(run_dir), "--seed_everything", str(seed),
        "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0",
        "--trainer.num_sanity_val_steps", "0", "--trainer.enable_progress_bar", "false",
        *ARMS[arm],
    ]  # fmt: skip
    run(command, runs / f"{run_dir.name}.log")
    return run_dir


def score(generator: str, arm: str, num_captions: int) -> dict[str, float]:
    """Score weights under an arm's encoding on captions of every length."""
    bundle = ScenesBase(generator=generator).load()
    figures: dict[str, float] = {}
    for length in LENGTHS:
        samples = [make_sample("3x3", SCORE_STREAM, i, length=length) for i in range(num_captions)]
        result = score_bundle(bundle, encoding(arm), samples)
        figures |= {f"{length}/{k}": v for k, v in result.accuracies().items()}
        figures |= {f"{length}/chance/{k}": v for k, v in result.chance_accuracies().items()}
    return figures


def main() -> None:
    """Train and score all arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--num-captions", type=int, default=256)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "scenes_stage1")
    parser.add_argument("--jobs", type=int, default=2, help="Runs at a time, one core each.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = [(arm, seed) for seed in options.seeds for arm in options.arms]
    results = {f"base/{arm}": [score("shipped", arm, options.num_captions)] for arm in options.arms}
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            cell: pool.submit(train, *cell, options.steps, options.runs.resolve()) for cell in cells
        }
        for (arm, seed), job in jobs.items():
            figures = score(str(job.result()), arm, options.num_captions)
            results.setdefault(f"tuned/{arm}", []).append(figures)
            print(f"{arm} seed {seed}: {summary(figures)}", flush=True)
    write(results, options.steps, options.seeds)


def summary(figures: dict[str, float]) -> str:
    """Show the most telling figures of one run."""
    names = ("long/attributes/past_77", "long/chance/attributes/past_77", "very_long/attributes")
    return ", ".join(f"{name} {figures[name]:.3f}" for name in names)


COLUMNS = {
    "past 77": "long/attributes/past_77",
    "chance": "long/chance/attributes/past_77",
    "within 77": "long/attributes/within_77",
    "within 32": "long/attributes/within_32",
    "all of a long caption": "long/attributes",
    "360-690 tokens": "very_long/attributes",
    "short captions": "short/attributes",
}


def write(results: dict[str, list[dict[str, float]]], steps: int, seeds: list[int]) -> None:
    """Write the figures and the table."""
    what = f"Attribute accuracy on new scenes; {steps} steps from the shipped base"
    lines = [
        f"{what}; mean over seeds {', '.join(map(str, seeds))} (lowest to highest).",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for name, runs in results.items():
        cells = [cell([run[key] for run in runs]) for key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenes_stage1.md").write_text(text)
    document = {"steps": steps, "seeds": seeds, "results": results}
    (folder / "scenes_stage1.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
