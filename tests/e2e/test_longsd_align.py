"""The flagship recipe through main.py: tiny from end to end, and without weights or data."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import main

pytestmark = pytest.mark.e2e
CONFIGS = Path(__file__).parents[2] / "configs"
FLAGSHIP, TINY = CONFIGS / "longsd_align.yaml", CONFIGS / "debug" / "longsd_align_tiny.yaml"


def fit(run_dir, *options, configs=(FLAGSHIP,)):
    files = [argument for path in configs for argument in ("--config", str(path))]
    plain = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
    return main.main(["fit", *files, "--run_dir", str(run_dir), *plain, *options])


def scenes(root):
    return json.dumps({"world": "2x2", "num_train": 8, "num_val": 4, "root": str(root)})


def test_the_recipe_runs_on_a_laptop(tmp_path):
    run_dir = tmp_path / "run"
    options = ("--data.init_args.scenes", scenes(tmp_path / "scenes"))
    assert fit(run_dir, *options, configs=(FLAGSHIP, TINY)) == 0
    with (run_dir / "logs" / "metrics.csv").open(newline="") as lines:
        losses = [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    steps = [load_file(path) for path in sorted(run_dir.rglob("model.safetensors"))]
    # What is trained, and kept: LoRA and adapter, in float32 under bf16-mixed over bfloat16.
    assert len(steps) == 2
    adapter = [name for name in steps[0] if ".adapter." in name]
    assert len(adapter) == 12
    assert all("lora_" in name for name in steps[0].keys() - adapter)
    assert {tensor.dtype for tensor in steps[0].values()} == {torch.float32}
    moved = [name for name in steps[0] if not torch.equal(steps[0][name], steps[1][name])]
    assert any("lora_B" in name for name in moved)
    assert set(adapter) <= set(moved)
    assert len(list((run_dir / "samples").glob("*.png"))) == 2


def last_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert errors == lines[-1:]
    return errors[0]


def test_without_weights_one_line_says_what_to_download_and_where_to_put_it(tmp_path, capsys):
    options = (
        "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--data.init_args.train_shards", "null", "--data.init_args.val_shards", "null",
        "--data.init_args.scenes", scenes(tmp_path / "scenes"),
    )  # fmt: skip
    assert fit(tmp_path / "run", *options) == 78
    error = last_line(capsys)
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert error.startswith(f"error: expected the text-to-image model `{model}` in the hub's cache")
    assert f"run `hf download {model} --local-dir models/stable-diffusion-v1-5`" in error
    assert fit(tmp_path / "run2", *options, "--vars.base", "./models/mine") == 78
    assert "expected the text-to-image model at `./models/mine`" in last_line(capsys)


def test_without_data_one_line_says_how_to_make_them(tmp_path, capsys):
    options = ("--trainer.accelerator", "cpu", "--trainer.devices", "1")
    assert fit(tmp_path / "run", *options, "--vars.data", str(tmp_path / "data")) == 65
    shards = tmp_path / "data" / "train"
    assert last_line(capsys) == (
        f"error: a folder of shards was expected; `{shards}` is none; check the path or make it "
        "with `shards pack`"
    )
