import json
import platform
import subprocess
from types import SimpleNamespace

import pytest
import torch
import yaml

from callbacks import run_config
from callbacks.run_config import RunConfigWriter
from segalign.errors import StorageError


@pytest.fixture
def trainer(run_dir):
    return SimpleNamespace(
        default_root_dir=str(run_dir),
        is_global_zero=True,
        world_size=2,
        fast_dev_run=False,
        ckpt_path=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        num_devices=2,
        num_nodes=1,
        precision="32-true",
    )


def attempt(trainer, config, stage="fit"):
    RunConfigWriter(config, ["fit", "--x"], ["a.yaml"]).setup(trainer, None, stage)


def record(run_dir):
    return json.loads((run_dir / "run.json").read_text())["attempts"]


def test_an_attempt_is_recorded(trainer, run_dir):
    attempt(trainer, {"seed_everything": 3, "vars": {"ü": 1e-5}})
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == {
        "seed_everything": 3,
        "vars": {"ü": 1e-5},
    }
    (only,) = record(run_dir)
    assert only["attempt"] == 1
    assert only["config"] == "config.yaml"
    assert only["config_sources"] == ["a.yaml"]
    assert only["command"] == ["main.py", "fit", "--x"]
    assert only["seed"] == 3
    assert only["world_size"] == 2
    assert set(only["versions"]) >= {"python", "torch", "lightning", "diffusers", "segalign"}
    assert only["host"] == platform.node()
    assert only["device"]["kind"] == "cpu"
    assert (only["device"]["per_node"], only["device"]["nodes"]) == (2, 1)
    assert only["checkpoint"] is None
    assert set(only["git"]) == {"commit", "dirty"}


def test_all_seeds_and_allowed_changes_are_recorded(trainer, run_dir):
    trainer.ckpt_path = run_dir / "checkpoints" / "step-00000002"
    config = {
        "seed_everything": 3,
        "data": {"init_args": {"seed": 4, "scenes": [{"noise_seed": 5}], "seeded": True}},
        "checkpoint": {"allow_changes": ["model.init_args.width"]},
    }
    writer = RunConfigWriter(config, ["fit"], [])
    writer.setup(trainer, None, "fit")
    writer.on_fit_start(trainer, None)
    (only,) = record(run_dir)
    assert only["seeds"] == {
        "seed_everything": 3,
        "data.init_args.seed": 4,
        "data.init_args.scenes.0.noise_seed": 5,
    }
    assert only["allowed_changes"] == ["model.init_args.width"]
    assert only["checkpoint"].endswith("/checkpoints/step-00000002")


def test_what_killed_writers_left_is_removed(trainer, run_dir):
    run_dir.mkdir()
    for name in ("run.json", "config.yaml"):
        (run_dir / f".{name}.tmp-0123456789ab").write_text("{")
    other = run_dir / ".state.json.tmp-0123456789ab"  # its writer may be at work
    other.write_text("{")
    attempt(trainer, {})
    assert sorted(run_dir.iterdir()) == [other, run_dir / "config.yaml", run_dir / "run.json"]


def test_only_a_changed_config_is_written_again(trainer, run_dir):
    for steps in (1, 1, 2, 2, 1):
        attempt(trainer, {"steps": steps})
    assert [entry["config"] for entry in record(run_dir)] == [
        "config.yaml",
        "config.yaml",
        "config.attempt-3.yaml",
        "config.attempt-3.yaml",
        "config.yaml",
    ]
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "config.attempt-3.yaml",
        "config.yaml",
        "run.json",
    ]


def test_an_unreadable_record_is_set_aside(trainer, run_dir):
    run_dir.mkdir()
    (run_dir / "run.json").write_text("{")
    attempt(trainer, {})
    assert len(record(run_dir)) == 1
    assert (run_dir / "run.unreadable.json").read_text() == "{"


@pytest.mark.parametrize(
    ("stage", "change"),
    [("validate", {}), ("fit", {"is_global_zero": False}), ("fit", {"fast_dev_run": True})],
)
def test_nothing_is_written_otherwise(trainer, run_dir, stage, change):
    vars(trainer).update(change)
    attempt(trainer, {}, stage)
    assert not run_dir.exists()


def test_an_unwritable_directory_is_a_storage_error(trainer, run_dir):
    run_dir.write_text("")
    with pytest.raises(StorageError, match="File exists"):
        attempt(trainer, {})


def test_a_checkpoint_carries_the_config():
    checkpoint: dict = {}
    RunConfigWriter({"a": 1}, [], []).on_save_checkpoint(None, None, checkpoint)
    assert checkpoint == {"run_config": {"a": 1}}


def test_git_state_tells_commit_and_changes(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    monkeypatch.setattr(run_config, "__file__", str(tmp_path / "callbacks.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_config._git_state() is None
    (tmp_path / "file").write_text("1")
    git("init", "-q")
    git("add", "file")
    git("commit", "-qm", "start")
    state = run_config._git_state()
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert run_config._git_state()["dirty"] is True


def test_a_missing_git_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_config._git_state() is None
