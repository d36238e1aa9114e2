"""SIGKILL at any moment costs at most the steps since the last checkpoint."""

import csv
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from run_comparison import assert_same_training, losses

from segalign.run_directory import list_checkpoints, newest_checkpoint, read_best
from segalign.run_format import load_checkpoint


@pytest.fixture(scope="module")
def start(server, toy_config, tmp_path_factory):
    """Start a fit of the toy into a run directory; returns the process id."""
    log = tmp_path_factory.mktemp("log") / "log.txt"

    def start(run_dir: Path, *options: str) -> int:
        fixed = ["fit", "--allow_import=toy_house", f"--config={toy_config}", "--ckpt_path=auto"]
        return server.start([*fixed, f"--run_dir={run_dir}", *options], log)

    return start


@pytest.fixture(scope="module")
def straight(server, start, tmp_path_factory):
    """Run the toy without an interruption; returns its run directory."""
    run_dir = tmp_path_factory.mktemp("straight")
    start(run_dir)
    assert server.wait() == 0
    return run_dir


def assert_ended_alike(straight: Path, broken: Path) -> None:
    assert_same_training(broken, straight)
    assert load_checkpoint(newest_checkpoint(broken))["global_step"] == len(losses(straight))
    stale = [p.name for p in (broken / "checkpoints").iterdir() if p.name.startswith(".")]
    assert stale == []


def test_a_kill_in_mid_epoch_changes_nothing(server, start, straight, run_dir):
    start(run_dir, "--trainer.callbacks+=toy_house.Kill", "--trainer.callbacks.at_step=8")
    assert server.wait() == -signal.SIGKILL
    assert newest_checkpoint(run_dir).name == "step-00000005"
    start(run_dir)
    assert server.wait() == 0
    assert_ended_alike(straight, run_dir)


@pytest.mark.parametrize("at_sync", range(1, 18, 3))
def test_a_kill_while_saving_changes_nothing(server, start, straight, run_dir, at_sync):
    callback = "toy_house.KillWhileSaving"
    start(run_dir, f"--trainer.callbacks+={callback}", f"--trainer.callbacks.at_sync={at_sync}")
    assert server.wait() == -signal.SIGKILL
    start(run_dir)
    assert server.wait() == 0
    assert_ended_alike(straight, run_dir)


def num_batches(run_dir: Path) -> int:
    path = run_dir / "losses.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


NUM_KILLS = 4
LONGEST_ATTEMPT = 15  # batches


def test_kills_at_random_times_change_nothing(server, start, tmp_path, seed):
    # The moments are drawn in batches of progress, so that a slow machine sees the same kills.
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = [f"--trainer.max_steps={2 * NUM_KILLS * LONGEST_ATTEMPT}"]
    start(straight, *options)
    assert server.wait() == 0
    moments = random.Random(seed)
    for _ in range(NUM_KILLS):
        wanted = num_batches(broken) + moments.randint(1, LONGEST_ATTEMPT)
        process = start(broken, *options)
        deadline = time.monotonic() + 120
        while num_batches(broken) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        os.kill(process, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    start(broken, *options)
    assert server.wait() == 0
    assert_ended_alike(straight, broken)
    assert len(list_checkpoints(broken)) == 2


def stage_one(run_dir: Path, *callbacks: dict) -> list[str]:
    """Compose a fit of the real stage 1 on tiny scenes."""
    repository = Path(__file__).parents[2]
    scenes = {"world": "2x2", "num_train": 24, "num_val": 4, "root": str(run_dir.parent / "scenes")}
    base = {"world": "2x2", "generator": "random", "text_model": "random"}
    averaged = [{"class_path": "callbacks.ema.EMA"}, *callbacks]
    return [
        "fit", f"--config={repository / 'configs/quickstart.yaml'}",
        "--allow_import=toy_house", "--ckpt_path=auto", f"--run_dir={run_dir}",
        f"--data.init_args.scenes={json.dumps(scenes)}", "--data.init_args.num_workers=1",
        "--data.init_args.global_batch_size=8", "--trainer.max_steps=8",
        f"--model.init_args.base.init_args={json.dumps(base)}",
        f"--trainer.callbacks={json.dumps(averaged)}",
        "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_steps=2",
    ]  # fmt: skip


def logged(run_dir: Path, name: str) -> dict[str, str]:
    with (run_dir / "logs" / "metrics.csv").open(newline="") as lines:
        return {row["step"]: row[name] for row in csv.DictReader(lines) if row.get(name)}


def test_stage_one_resumes_bit_identically_after_a_kill(server, tmp_path):
    # 24 samples in batches of 8: the kill at step 5 is in the middle of the second epoch.
    log = tmp_path / "log.txt"
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    server.start(stage_one(straight), log)
    assert server.wait() == 0, log.read_text()
    kill = {"class_path": "toy_house.Kill", "init_args": {"at_step": 5}}
    server.start(stage_one(broken, kill), log)
    assert server.wait() == -signal.SIGKILL
    assert newest_checkpoint(broken).name == "step-00000004"
    server.start(stage_one(broken), log)
    assert server.wait() == 0, log.read_text()
    assert len(logged(straight, "train/loss")) == 8
    assert logged(broken, "train/loss") == logged(straight, "train/loss")
    # Text totals of 64 samples: two whole epochs of 24, and what the last one reached.
    captions = logged(straight, "epoch/num_captions")
    assert [float(count) for count in captions.values()] == [24, 24, 16]
    for name in ("epoch/index", "epoch/num_captions", "epoch/num_segments", "epoch/kept_tokens"):
        assert logged(broken, name) == logged(straight, name)
    for name in ("model", "ema", "optimizer"):
        one, other = (newest_checkpoint(run) / f"{name}.safetensors" for run in (straight, broken))
        assert one.read_bytes() == other.read_bytes(), name


def stage_two(run_dir: Path, *callbacks: dict) -> list[str]:
    """Compose a fit of the flagship's reward recipe, tiny."""
    configs = Path(__file__).parents[2] / "configs"
    scenes = {"world": "2x2", "num_train": 12, "num_val": 4, "root": str(run_dir.parent / "scenes")}
    return [
        "fit", f"--config={configs / 'longsd.yaml'}",
        f"--config={configs / 'debug' / 'longsd_tiny.yaml'}",
        "--allow_import=toy_house", "--ckpt_path=auto", f"--run_dir={run_dir}",
        f"--data.init_args.scenes={json.dumps(scenes)}", "--trainer.max_steps=4",
        f"--trainer.callbacks={json.dumps(callbacks)}", "--data.init_args.global_batch_size=2",
        "--data.init_args.val_batch_size=2",
        "--checkpoint.every_n_steps=2", "--checkpoint.overwrite=false",
    ]  # fmt: skip


def test_stage_two_resumes_bit_identically_after_a_kill(server, tmp_path):
    # The moving average of the common direction, the best checkpoint and the trained steps go on.
    log = tmp_path / "log.txt"
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    server.start(stage_two(straight), log)
    assert server.wait() == 0, log.read_text()
    kill = {"class_path": "toy_house.Kill", "init_args": {"at_step": 3}}
    server.start(stage_two(broken, kill), log)
    assert server.wait() == -signal.SIGKILL
    assert newest_checkpoint(broken).name == "step-00000002"
    server.start(stage_two(broken), log)
    assert server.wait() == 0, log.read_text()
    assert len(logged(straight, "train/loss")) == 4
    names = ("train/loss", "train/reward/common_share", "train/offset", "train/grad_norm")
    for name in (*names, "val/held_out/pickscore", "val/reward_mean"):
        assert logged(broken, name) == logged(straight, name), name
    for name in ("model", "optimizer", "extra"):
        one, other = (newest_checkpoint(run) / f"{name}.safetensors" for run in (straight, broken))
        assert one.read_bytes() == other.read_bytes(), name
    assert read_best(broken) == read_best(straight)
