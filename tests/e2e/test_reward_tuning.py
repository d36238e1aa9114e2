"""Stage 2 through main.py: the flagship's reward recipe tiny, its layers, its run in use."""

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import main
from segalign.rewards.zoo import ClipSettings
from segalign.run_directory import list_checkpoints, read_best

pytestmark = pytest.mark.e2e

CONFIGS = Path(__file__).parents[2] / "configs"
LONGSD, TINY = CONFIGS / "longsd.yaml", CONFIGS / "debug" / "longsd_tiny.yaml"
LCM, ON_SCENES = CONFIGS / "longsd_lcm.yaml", CONFIGS / "scenes" / "reward.yaml"
ABLATIONS = sorted((CONFIGS / "ablations").glob("*.yaml"))
ONE_STEP = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--checkpoint.monitor=null"]


def run(stage, run_dir, *options, configs=(LONGSD, TINY)):
    """Run a command; settings are values of any kind."""
    scenes = {"world": "2x2", "num_train": 8, "num_val": 4, "root": str(run_dir.parent / "scenes")}
    files = [f"--config={path}" for path in configs]
    return main.main([
        stage, *files, f"--run_dir={run_dir}", f"--data.init_args.scenes={json.dumps(scenes)}",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *options,
    ])  # fmt: skip


def rows(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def column(run_dir, name):
    table = rows(run_dir / "logs" / "metrics.csv")
    return [float(row[name]) for row in table if row.get(name)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The run directory of the recipe, tiny."""
    run_dir, before = tmp_path_factory.mktemp("longsd") / "run", dict(os.environ)
    assert run("fit", run_dir) == 0
    os.environ.clear()
    os.environ.update(before)
    return run_dir


def test_the_recipe_tunes_lora_alone_and_logs_the_reward(tuned):
    steps = [load_file(path / "model.safetensors") for path in list_checkpoints(tuned)]
    assert len(steps) == 2
    assert all(name.startswith("unet.") and "lora_" in name for name in steps[0])
    # In float32, under bf16-mixed over a bfloat16 base.
    assert {tensor.dtype for step in steps for tensor in step.values()} == {torch.float32}
    ups = [name for name in steps[0] if "lora_B" in name]
    assert 2 * len(ups) == len(steps[0])
    assert all(step[name].count_nonzero() for step in steps for name in ups)
    assert all(not torch.equal(steps[0][name], steps[1][name]) for name in ups)
    for name in ("reward_mean", "reward/text_relevant", "reward/text_irrelevant", "loss"):
        values = column(tuned, f"train/{name}")
        assert len(values) == 2
        assert all(map(math.isfinite, values))
    # The loss is minus the reward times `objective.scale`, the reward its parts with omega 0.3.
    reward = torch.tensor(column(tuned, "train/reward_mean"))
    assert torch.tensor(column(tuned, "train/loss")).allclose(-0.5 * reward)
    parts = [
        torch.tensor(column(tuned, f"train/reward/text_{part}relevant")) for part in ("", "ir")
    ]
    assert reward.allclose(parts[0] + 0.3 * parts[1], atol=1e-3)
    assert len(list((tuned / "samples").glob("*.png"))) == 2


def test_the_best_checkpoint_is_recorded_and_validated(tuned):
    best = read_best(tuned)
    assert best.step == 2
    assert best.value == pytest.approx(column(tuned, "val/held_out/clip_l")[0])
    assert run("validate", tuned, "--ckpt_path=best") == 0
    (row,) = rows(tuned / "logs" / "validate" / "metrics.csv")
    assert float(row["val/held_out/clip_l"]) == pytest.approx(best.value)


def test_a_run_is_used_without_the_weights_of_its_reward(tuned, tmp_path, monkeypatch):
    def refuse(_self):
        raise AssertionError("a reward was read")

    monkeypatch.setattr(ClipSettings, "load", refuse)
    with pytest.raises(AssertionError, match="a reward was read"):
        run("validate", tuned, "--ckpt_path=best")
    common = ["--checkpoint", str(tuned)]
    out = tmp_path / "lora"
    assert main.main(["export", *common, "--format", "lora", "--out", str(out)]) == 0
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    own = load_file(list_checkpoints(tuned)[-1] / "model.safetensors")
    assert len(weights) == len(own)
    out = tmp_path / "images"
    prompt = ["--prompt", "A fox.", "--out", str(out), "--device", "cpu"]
    assert main.main(["generate", *common, *prompt]) == 0
    assert Image.open(out / "00000000-s0.png").size == (64, 64)


def test_the_lcm_layer_trains_all_four_steps_without_guidance(tmp_path):
    options = [*ONE_STEP, "--model.init_args.rollout_sampler.num_inference_steps=4"]
    assert run("fit", tmp_path / "run", *options, configs=(LONGSD, LCM, TINY)) == 0
    assert column(tmp_path / "run", "train/offset") == [0]
    assert math.isfinite(column(tmp_path / "run", "train/loss")[0])


def scenes_options():
    random = {"world": "2x2", "weights": "random"}
    base = {"world": "2x2", "generator": "random", "text_model": "random"}
    settings = {
        "model.init_args.base.init_args": base,
        "model.init_args.held_out.scorer.init_args": random,
        "trainer.callbacks": [],
    }
    reward = [
        f"--model.init_args.reward.init_args.{name}={value}" for name, value in random.items()
    ]
    return [
        *reward,
        *(f"--{name}={json.dumps(value)}" for name, value in settings.items()),
        *ONE_STEP,
        "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--data.init_args.num_workers=0",
        "--data.init_args.global_batch_size=4",
        "--checkpoint.every_n_steps=1",
    ]


@pytest.mark.parametrize("layer", ABLATIONS, ids=lambda path: path.stem)
def test_every_ablation_runs_over_the_scenes_recipe(layer, tmp_path):
    run_dir = tmp_path / "run"
    assert run("fit", run_dir, *scenes_options(), configs=(ON_SCENES, layer)) == 0
    assert math.isfinite(column(run_dir, "train/loss")[0])
    assert column(run_dir, "train/grad_norm")[0] > 0


STRATEGY = "--model.init_args.strategy"
ERRORS = {
    "too many trained steps": (
        [f"{STRATEGY}=segalign.truncation.drtune.DRTune",
         f"{STRATEGY}.init_args.num_train_steps=9"],
        ["num_train_steps", "9", "6"],
    ),
    "no reward weights": (
        ["--vars.reward=luping-liu/Denscore", "--model.init_args.reward.init_args.init=pretrained"],
        ["expected the scorer `luping-liu/Denscore`", "hf download luping-liu/Denscore"],
    ),
    "no such strategy": (
        [f"{STRATEGY}=segalign.truncation.drtune.DRTuna"],
        ["DRTuna"],
    ),
    "clipping by the trainer": (
        ["--trainer.gradient_clip_val=0.3"],
        ["`trainer.gradient_clip_val` 0.3", "set `model.init_args.max_grad_norm` instead"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_one_line_says_what_is_wrong(case, tmp_path, capsys):
    options, wanted = ERRORS[case]
    assert run("fit", tmp_path / "run", *options) == 78
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error:")]
    assert error == lines[-1]
    for text in wanted:
        assert text in error
    assert list_checkpoints(tmp_path / "run") == []
