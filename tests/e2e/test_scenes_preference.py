"""Preference training on scenes through main.py: fit, resume, validate."""

import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import main
from segalign.run_directory import newest_checkpoint

CONFIG = str(Path(__file__).parents[2] / "configs" / "scenes" / "preference.yaml")


def run(stage, run_dir, *options):
    scenes = {
        "world": "2x2", "num_train": 32, "num_val": 8, "samples_per_shard": 16, "pairs": True,
        "root": str(run_dir.parent / "scenes"),
    }  # fmt: skip
    scorer = {
        "class_path": "segalign.scenes.scorers.ScenesScorer",
        "init_args": {"world": "2x2", "weights": "random"},
    }
    report = {
        "class_path": "callbacks.preference_report.PreferenceReport",
        "init_args": {"gallery_size": 8, "retrieval_on_preferred": True, "max_segments": [1, 2]},
    }
    return main.main([
        stage, "--config", CONFIG, "--run_dir", str(run_dir),
        "--data.init_args.scenes", json.dumps(scenes), "--data.init_args.num_workers", "0",
        "--data.init_args.global_batch_size", "4", "--data.init_args.val_batch_size", "8",
        "--model.init_args.scorer", json.dumps(scorer), "--model.init_args.init_logit_scale", "12",
        "--trainer.callbacks", json.dumps([report]), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false",
        "--trainer.log_every_n_steps", "1", *options,
    ])  # fmt: skip


def steps(number, **options):
    settings = {"max_steps": number, "val_check_interval": number, **options}
    return [f"--trainer.{name}={value}" for name, value in settings.items()]


def column(run_dir, name):
    with (run_dir / "logs" / "metrics.csv").open(newline="") as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def weights(run_dir):
    return load_file(newest_checkpoint(run_dir) / "model.safetensors")


def test_fit_resumes_and_validates(tmp_path, capsys):
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    # The schedule is that of the whole run.
    schedule = "--model.init_args.lr_scheduler.init_args.total_steps=3"
    assert run("fit", straight, *steps(3), schedule) == 0
    assert run("fit", run_dir, *steps(2), schedule) == 0
    assert len(column(run_dir, "train/loss")) == 2
    assert column(run_dir, "train/inverse_temperature")[0] == pytest.approx(12, rel=1e-6)
    for name in ("val/pair_accuracy", "val/r_at_1"):
        assert 0 <= column(run_dir, name)[0] <= 1

    assert run("fit", run_dir, *steps(3), schedule, "--ckpt_path", "auto") == 0
    assert column(run_dir, "train/loss") == column(straight, "train/loss")
    resumed, expected = weights(run_dir), weights(straight)
    assert resumed.keys() == expected.keys()
    assert all(resumed[name].equal(weight) for name, weight in expected.items())

    assert run("validate", run_dir, "--ckpt_path", "auto") == 0
    assert "val/pair_accuracy" in capsys.readouterr().out


def test_captions_cut_at_the_context_train_too(tmp_path):
    options = ["--model.init_args.text=whole", "--model.init_args.trained.text_blocks=1"]
    assert run("fit", tmp_path / "run", *steps(2, limit_val_batches=0), *options) == 0
    stored = weights(tmp_path / "run")
    assert any("vision_model.embeddings" in name for name in stored)
    assert not any("text_model.embeddings" in name for name in stored)


def test_pairs_must_be_asked_for(tmp_path, capsys):
    assert run("fit", tmp_path / "run", *steps(1), "--data.init_args.content=image") == 78
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: `data.content: preference` goes with `data.scenes.pairs: true`")
