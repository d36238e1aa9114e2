"""The best checkpoint through main.py: kept while training, evaluated by its name, gone on from."""

import csv
import json
import shutil

import pytest
import torch

from segalign.run_directory import (
    best_checkpoint,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    newest_checkpoint,
    read_best,
)
from segalign.run_format import load_checkpoint

pytestmark = pytest.mark.e2e

MONITORED = """
trainer:
  limit_val_batches: 1.0
  check_val_every_n_epoch: null
  val_check_interval: 6
  accumulate_grad_batches: 2
checkpoint: {monitor: val/loss, monitor_mode: min, every_n_steps: 100, keep: 5}
"""


@pytest.fixture
def monitored(toy_command, tmp_path):
    """Run the toy with a monitor."""
    layer = tmp_path / "monitored.yaml"
    layer.write_text(MONITORED)
    return lambda *options, stage="fit": toy_command(stage, *options, configs=(layer,))


def tensors(tree):
    """Turn all tensors of a tree into bytes."""
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [tensors(value) for value in tree]
    return tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_checkpoint_made_after_validating_goes_on_like_a_straight_run(
    monitored, run_dir, tmp_path
):
    assert monitored() == 0
    first = list_checkpoints(run_dir)[0]
    assert checkpoint_step(first) == 3
    broken = tmp_path / "broken"
    shutil.copytree(first, checkpoint_path(broken, 3))
    assert monitored(f"--run_dir={broken}", "--ckpt_path=auto") == 0
    one, other = (load_checkpoint(newest_checkpoint(run)) for run in (run_dir, broken))
    for part in ("state_dict", "optimizer_states", "ema"):
        assert tensors(one[part]) == tensors(other[part]), part
    records = [json.loads(line) for line in (run_dir / "losses.jsonl").read_text().splitlines()]
    lines = (broken / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records[6:]
    one, other = (
        [row["val/loss"] for row in rows(run / "logs" / "metrics.csv") if row["val/loss"]]
        for run in (run_dir, broken)
    )
    assert one[1:] == other


def test_best_is_a_word_of_evaluation(monitored, run_dir, tmp_path, capsys):
    assert monitored("--trainer.max_steps=8") == 0
    best = best_checkpoint(run_dir)
    assert checkpoint_step(best) == 6
    assert checkpoint_step(newest_checkpoint(run_dir)) == 8
    for word in ("best", f"{run_dir}/checkpoints/best"):
        assert monitored(f"--ckpt_path={word}", stage="validate") == 0
        row = rows(run_dir / "logs" / "validate" / "metrics.csv")[-1]
        assert float(row["val/loss"]) == pytest.approx(read_best(run_dir).value)
    capsys.readouterr()
    assert monitored("--ckpt_path=best") == 78
    line = capsys.readouterr().err.splitlines()[-1]
    assert "got `best`, which is for evaluation" in line
    start = [f"--ckpt_path={run_dir}/checkpoints/best", f"--run_dir={tmp_path}/other"]
    assert monitored(*start, "--trainer.max_steps=7") == 0
    assert [checkpoint_step(p) for p in list_checkpoints(tmp_path / "other")] == [7]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_without_a_best_the_word_is_refused(toy_command, stage, capsys):
    assert toy_command(stage, "--ckpt_path=best") == 78
    assert "expected a best checkpoint for `--ckpt_path best`" in capsys.readouterr().err
