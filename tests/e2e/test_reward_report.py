"""A real tiny generator with a monitor and the report, through main.py; then its best images."""

import json
from pathlib import Path

import pytest
from PIL import Image

import main
from segalign.run_directory import best_checkpoint, newest_checkpoint, read_best
from segalign.run_format import read_tensors
from segalign.scenes.weights import read_weights

pytestmark = pytest.mark.e2e

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
CALLBACKS = [
    {"class_path": "callbacks.ema.EMA"},
    {
        "class_path": "callbacks.reward_report.RewardReport",
        "init_args": {"num_captions": 3, "num_pictures": 2, "batch_size": 2, "weights": "ema"},
    },
]


def test_the_best_of_a_real_run_is_reported_and_used(tmp_path, capsys):
    run_dir = tmp_path / "run"
    scenes = {"world": "2x2", "num_train": 8, "num_val": 4, "root": str(tmp_path / "scenes")}
    base = {"world": "2x2", "generator": "random", "text_model": "random"}
    code = main.main([
        "fit", "--config", str(CONFIG), "--run_dir", str(run_dir), "--allow_import", "toy_reward",
        "--model", "toy_reward.BrightModule", "--model.init_args.base.init_args", json.dumps(base),
        "--model.init_args.sampler.num_inference_steps", "2",
        "--data.init_args.scenes", json.dumps(scenes), "--data.init_args.num_workers", "0",
        "--data.init_args.global_batch_size", "4", "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks", json.dumps(CALLBACKS), "--trainer.max_steps", "3",
        "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "1",
        "--trainer.check_val_every_n_epoch", "null", "--checkpoint.monitor", "val/loss",
        "--checkpoint.monitor_mode", "max", "--checkpoint.every_n_steps", "1",
    ])  # fmt: skip
    assert code == 0
    # The loss falls, so its maximum is the first.
    assert read_best(run_dir).step == 1
    assert best_checkpoint(run_dir) != newest_checkpoint(run_dir)
    text = (run_dir / "report.md").read_text()
    assert "| measure | before | after | best (step 1) | change (best - before) |" in text
    for name in ("reward", "reward/text_relevant", "held_out/darkness", "facts shown: objects"):
        assert f"| {name} | " in text
    assert Image.open(run_dir / "report.png").size[0] > 500

    virtual = run_dir / "checkpoints" / "best"
    weights = read_weights(str(virtual), "generator", ["unet."], "2x2")
    average = read_tensors(best_checkpoint(run_dir) / "ema.safetensors")
    assert weights["conv_in.weight"].equal(average["unet.conv_in.weight"])
    common = ["--checkpoint", str(virtual), "--allow_import", "toy_reward"]
    prompt = ["--prompt", "a red circle", "--out", str(tmp_path / "images"), "--device", "cpu"]
    assert main.main(["generate", *common, *prompt]) == 0
    out = ["--format", "diffusers", "--out", str(tmp_path / "exported")]
    assert main.main(["export", *common, *out]) == 0
    assert "Optimizer steps: 1" in (tmp_path / "exported" / "README.md").read_text()
