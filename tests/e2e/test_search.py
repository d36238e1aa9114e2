"""A search from its file to its end, with runs on two ranks that fall behind and are stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import yaml

from segalign.launch.plan import Plan
from segalign.launch.running.run_state import RunStatus, read_state
from segalign.launch.searching.trial_storage import open_storage

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]
BASE = {
    "seed_everything": 0,
    "model": {"class_path": "toy_house.ToyModule"},
    "data": {"class_path": "toy_house.ToyData"},
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp",
        "max_steps": 6,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
    },
    "checkpoint": {"every_n_steps": 100},
}
STUDY = {
    "name": "toy",
    "grid": {"model.init_args.scale": {"low": 0.5, "high": 2.0}},
    "metrics": [{"name": "val/loss", "mode": "min"}],
    "search": {"trials": 1, "prune": True},
}


@pytest.fixture
def study(tmp_path):
    """Write a study, and trials of its search that are better than any run can be."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    folders = {"folder": str(tmp_path / "toy"), "runs_folder": str(tmp_path / "runs")}
    content = {**STUDY, **folders, "base": str(tmp_path / "base.yaml")}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    trials = optuna.create_study(
        study_name="toy", storage=open_storage(str(tmp_path / "toy" / "optuna.journal"))
    )
    for _ in range(5):
        trials.add_trial(optuna.create_trial(value=-1.0, intermediate_values={2: -1.0}))
    return tmp_path / "toy.yaml"


def sweep(study: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY / "tests" / "toys")
    return subprocess.run(
        [sys.executable, "main.py", "sweep", *arguments[:1], str(study), *arguments[1:]],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_runs_that_fall_behind_are_stopped_and_told(study):
    first = sweep(study, "run", "--local=1", "--allow_import=toy_house")
    assert first.returncode == 0, first.stderr
    folder = study.parent / "toy"
    runs = Plan.load(folder).runs
    assert [run.trial for run in runs] == [5]
    for run in runs:
        state = read_state(run.directory)
        log = (run.directory / "sweep" / "attempt-1.log").read_text()
        assert state.status is RunStatus.PRUNED, log
        assert state.exit_code == 86
        assert "stopped: pruned by the searcher at step 2: by `val/loss`" in log
        assert "Traceback" not in log
    trials = optuna.load_study(
        study_name="toy", storage=open_storage(str(folder / "optuna.journal"))
    ).trials[5:]
    assert [trial.state.name for trial in trials] == ["PRUNED"]
    assert [list(trial.intermediate_values) for trial in trials] == [[2]]
    # Nothing is left to do.
    before = json.loads((folder / "plan.json").read_bytes())
    assert sweep(study, "run", "--local=1", "--allow_import=toy_house").returncode == 0
    assert json.loads((folder / "plan.json").read_bytes()) == before
    assert not any((run.directory / "sweep" / "attempt-2.log").exists() for run in runs)
