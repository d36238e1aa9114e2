"""Two ranks train what one rank trains: same losses, same weights, same validation."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segalign.run_directory import newest_checkpoint

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]


def fit(run_dir: Path, *options: str) -> None:
    scenes = {"world": "2x2", "num_train": 20, "num_val": 6, "root": str(run_dir.parent / "scenes")}
    base = {"world": "2x2", "generator": "random", "text_model": "random"}
    callbacks = [
        {"class_path": "callbacks.ema.EMA"},
        {
            "class_path": "callbacks.scene_accuracy.SceneAccuracy",
            "init_args": {"world": "2x2", "num_batches": 1},
        },
        {
            "class_path": "callbacks.sample_grid.SampleGrid",
            "init_args": {"num_samples": 2, "every_n_steps": 2},
        },
        {
            "class_path": "callbacks.image_evaluation.ImageEvaluation",
            "init_args": {"num_captions": 6, "images_per_caption": 2, "batch_size": 4},
        },
        {
            "class_path": "callbacks.fid.FID",
            "init_args": {
                "extractor": {
                    "class_path": "segalign.metrics.extractors.tiny.TinyExtractor",
                    "init_args": {"num_features": 4},
                }
            },
        },
        {
            "class_path": "callbacks.lpips.LPIPS",
            "init_args": {
                "network": {"class_path": "segalign.metrics.perceptual.tiny.TinyPerceptual"}
            },
        },
    ]
    command = [
        sys.executable, "main.py", "fit", "--config=configs/quickstart.yaml",
        f"--run_dir={run_dir}", f"--data.init_args.scenes={json.dumps(scenes)}",
        "--data.init_args.num_workers=0", "--data.init_args.global_batch_size=8",
        "--data.init_args.val_batch_size=8", f"--model.init_args.base.init_args={json.dumps(base)}",
        "--model.init_args.sampler.num_inference_steps=2", "--trainer.accelerator=cpu",
        f"--trainer.callbacks={json.dumps(callbacks)}", "--trainer.max_steps=4",
        "--trainer.limit_val_batches=1", "--trainer.val_check_interval=4",
        "--trainer.check_val_every_n_epoch=null", "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false", "--checkpoint.every_n_steps=4", *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "logs" / "metrics.csv").open(newline="") as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row.get(name)]


def test_two_ranks_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    fit(
        one,
        "--trainer.devices=1",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=8",
    )
    fit(two, "--trainer.devices=2", "--trainer.strategy=ddp")
    ours, theirs = (load_file(newest_checkpoint(run) / "model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    # float32, and the order of summation differs between ranks and accumulation.
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], rtol=1e-3, atol=2e-5), name
    assert column(two, "val/loss") == pytest.approx(column(one, "val/loss"), rel=1e-3)
    assert len(column(two, "val/attributes")) == 1
    assert column(two, "val/attributes") == pytest.approx(column(one, "val/attributes"), abs=0.1)
    grids = sorted(path.name for path in (two / "samples").iterdir())
    assert grids == ["step-00000000.png", "step-00000002.png", "step-00000004.png"]
    evaluated = [column(two, f"val/{name}") for name in ("fid", "lpips_diversity", "lpips_drift")]
    expected = [column(one, f"val/{name}") for name in ("fid", "lpips_diversity", "lpips_drift")]
    # The start is the same bits; what was trained differs by rounding.
    assert [values[0] for values in evaluated] == [values[0] for values in expected]
    for found, wanted in zip(evaluated, expected, strict=True):
        assert len(found) == 2
        assert found == pytest.approx(wanted, rel=0.01)
