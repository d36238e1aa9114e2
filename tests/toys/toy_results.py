"""Studies whose runs never ran: their logs and results are written by hand."""

import csv
from pathlib import Path

from segalign.evaluation.result import EvaluationResult, MetricResult
from segalign.launch.plan import Plan, PlannedRun
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import RunState, RunStatus
from segalign.launch.study import MetricSpec, Study


def write_log(path: Path, rows: list[dict[str, object]]) -> None:
    """Write ``metrics.csv`` as runs do: a name is empty in rows that do not have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["step", "epoch", *sorted({name for row in rows for name in row} - {"step", "epoch"})]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_curves(run_dir: Path, curves: dict[str, dict[int, float]]) -> None:
    """Write the log of a training."""
    steps = sorted({step for curve in curves.values() for step in curve})
    write_log(
        run_dir / "logs" / "metrics.csv",
        [
            {"step": step} | {name: curve[step] for name, curve in curves.items() if step in curve}
            for step in steps
        ],
    )


def write_result(run_dir: Path, values: dict[str, float], **protocol: object) -> Path:
    """Write the result of a test with one metric, ``fid``."""
    path = run_dir / "evaluation" / "test" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    EvaluationResult(
        model={"name": run_dir.name},
        weights="raw",
        num_captions=4,
        images_per_caption=1,
        batch_size=2,
        eval_seed=0,
        prompts="abc",
        metrics={"fid": MetricResult(values=values, protocol={"metric": "frechet", **protocol})},
        num_counted=4,
    ).save(path)
    return path


def metric(name: str, **options: object) -> MetricSpec:
    return MetricSpec(**{"name": name, "label": name.partition("/")[2], **options})


def study(folder: Path, **options: object) -> Study:
    return Study(
        **{
            "name": "toy",
            "file": folder / "toy.yaml",
            "base": (),
            "seeds": (0, 1, 2),
            "metrics": (metric("val/score"),),
            "folder": folder / "study",
            "runs_folder": folder / "runs",
            **options,
        }
    )


def planned(folder: Path, label: str, seed: int, levels: dict[str, str] | None = None):
    run_id = f"{label}-{seed}".replace(" ", "").replace("/", "")
    return PlannedRun(
        run_id=run_id,
        label=label,
        arm=label.partition(",")[0],
        levels=levels or {},
        seed=seed,
        directory=folder / "runs" / run_id,
    )


def seen(run: PlannedRun, status: RunStatus = RunStatus.DONE, **options: object):
    """Return a run as the observer of runs would have it."""
    state = None
    if status not in (RunStatus.PENDING, RunStatus.QUEUED, RunStatus.DEAD):
        keys = ("exit_code", "reason")
        state = RunState(status=status, **{k: v for k, v in options.items() if k in keys})
    steps = {key: options.get(key) for key in ("step", "max_steps")}
    return ObservedRun(
        run=run, status=status, state=state, beat_age=None, progress_age=None, **steps
    )


def scored_study(folder: Path, scores: dict[str, list[float | None]], **options: object):
    """Make a study with one validation for each run: scores by label and seed.

    None is a run that was never started.
    """
    runs = [planned(folder, label, seed) for label in scores for seed in range(len(scores[label]))]
    observed = []
    for run in runs:
        score = scores[run.label][run.seed]
        if score is not None:
            write_curves(run.directory, {"val/score": {9: score}})
            observed.append(seen(run))
    plan = Plan(study="toy", base_label=next(iter(scores)), runs=runs)
    return study(folder, **options), plan, observed
