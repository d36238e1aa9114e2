"""Stage 1 on scenes through main.py: fit, report, resume, validate, predict, scorer."""

import csv
import json
from pathlib import Path

from PIL import Image

import main
from segalign.evaluation.history import History

CONFIGS = Path(__file__).parents[2] / "configs"


def run(stage, config, run_dir, *options):
    scenes = json.dumps({
        "world": "2x2", "num_train": 32, "num_val": 8, "samples_per_shard": 16,
        "root": str(run_dir.parent / "scenes"),
    })  # fmt: skip
    return main.main([
        stage, "--config", str(CONFIGS / config), "--run_dir", str(run_dir),
        "--data.init_args.scenes", scenes, "--data.init_args.num_workers", "0",
        "--data.init_args.global_batch_size", "4", "--trainer.enable_progress_bar", "false",
        "--trainer.log_every_n_steps", "1", *options,
    ])  # fmt: skip


def diffusion_options(run_dir):
    base = {"world": "2x2", "generator": "random", "text_model": "random"}
    callbacks = [
        {"class_path": "callbacks.ema.EMA"},
        {
            "class_path": "callbacks.scene_accuracy.SceneAccuracy",
            "init_args": {"world": "2x2", "num_batches": 1, "weights": "ema"},
        },
        {"class_path": "callbacks.sample_grid.SampleGrid", "init_args": {"num_samples": 3}},
        {
            "class_path": "callbacks.scenes_report.ScenesReport",
            "init_args": {"world": "2x2", "num_captions": 4, "num_pictures": 2, "weights": "ema"},
        },
    ]
    return [
        "--model.init_args.base.init_args", json.dumps(base),
        "--model.init_args.sampler.num_inference_steps", "2",
        "--trainer.callbacks", json.dumps(callbacks),
        "--trainer.max_steps", "3", "--trainer.limit_val_batches", "2",
        "--data.init_args.val_batch_size", "4",
    ]  # fmt: skip


def metric(run_dir, name):
    with (run_dir / "logs" / "metrics.csv").open(newline="") as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def test_fit_reports_resumes_validates_and_predicts(tmp_path, capsys):
    run_dir = tmp_path / "run"
    options = diffusion_options(run_dir)
    fit = ("fit", "quickstart.yaml", run_dir, *options, "--trainer.val_check_interval", "2")
    fit = (*fit, "--trainer.check_val_every_n_epoch", "null")
    assert run(*fit) == 0
    printed = capsys.readouterr().out
    assert "Attribute accuracy: before -> after" in printed
    assert "truncated (evaluated only)" in printed
    assert "segments (trained)" in printed
    assert (run_dir / "report.md").read_text().count("->") >= 8
    assert Image.open(run_dir / "report.png").size[0] > 500
    grids = sorted(path.name for path in (run_dir / "samples").iterdir())
    assert grids == ["step-00000000.png", "step-00000003.png"]
    assert len(metric(run_dir, "train/loss")) == 3
    assert len(metric(run_dir, "val/attributes")) == 1
    assert 0 <= metric(run_dir, "val/attributes")[0] <= 1
    assert (run_dir / "data_report.json").is_file()

    assert run(*fit) == 0  # finished: nothing is trained, the report is shown again
    assert "This run was finished before." in capsys.readouterr().out
    assert len(metric(run_dir, "train/loss")) == 3

    assert run("validate", "quickstart.yaml", run_dir, *options) == 0
    assert run("predict", "quickstart.yaml", run_dir, *options) == 0
    lines = (run_dir / "predictions" / "captions-rank-0.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [row["file"] for row in written] == [f"{i:08d}.png" for i in range(8)]
    assert all(
        Image.open(run_dir / "predictions" / row["file"]).size == (24, 24) for row in written
    )


def test_the_scorer_trains_with_both_losses(tmp_path):
    run_dir = tmp_path / "scorer"
    options = [
        "--model.init_args.world", "2x2", "--model.init_args.contrastive_start", "1",
        "--trainer.max_steps", "2", "--trainer.val_check_interval", "2",
    ]  # fmt: skip
    assert run("fit", "scenes/scorer.yaml", run_dir, *options) == 0
    assert len(metric(run_dir, "train/loss")) == 2
    assert len(metric(run_dir, "train/contrastive_loss")) == 1
    assert 0 <= metric(run_dir, "val/dense_accuracy")[0] <= 1


def test_the_quickstart_runs_on_the_shipped_base(tmp_path, capsys):
    # More real images than the tiny extractor has features, as FID wants.
    scenes = {"num_train": 64, "num_val": 72, "root": str(tmp_path / "scenes")}
    code = main.main([
        "fit", "--config", str(CONFIGS / "quickstart.yaml"), "--run_dir", str(tmp_path / "run"),
        "--data.init_args.scenes", json.dumps(scenes), "--trainer.max_steps", "2",
        "--trainer.val_check_interval", "2", "--model.init_args.sampler.num_inference_steps", "3",
    ])  # fmt: skip
    assert code == 0
    history = History(tmp_path / "run" / "evaluation" / "history.jsonl").read()
    assert list(history) == [0, 2]
    names = {"attributes", "fid_tiny", "kid_tiny", "distance_tiny_diversity"}
    assert names <= history[2].keys()
    assert (tmp_path / "run" / "evaluation" / "curves.png").is_file()
    rows = (tmp_path / "run" / "report.md").read_text().splitlines()
    truncated = next(row for row in rows if row.startswith("| short | truncated"))
    before = float(truncated.split("|")[3].split("->")[0])
    assert before > 0.8  # the base follows what it can read


def test_evaluation_only_observes(tmp_path):
    losses = []
    for name, callbacks in (("watched", None), ("alone", "[]")):
        run_dir = tmp_path / name
        options = diffusion_options(run_dir)
        if callbacks is not None:
            options[options.index("--trainer.callbacks") + 1] = callbacks
        evaluate = [
            "--trainer.val_check_interval",
            "1",
            "--trainer.check_val_every_n_epoch",
            "null",
        ]
        assert run("fit", "quickstart.yaml", run_dir, *options, *evaluate) == 0
        with (run_dir / "logs" / "metrics.csv").open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        losses.append([row["train/loss"] for row in rows if row["train/loss"]])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]  # as text: to the last bit
