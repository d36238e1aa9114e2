"""Studies on a real cluster, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from segalign.launch.plan import Plan, PlannedRun
from segalign.launch.running.run_state import RunState, read_state
from segalign.launch.slurm.slurm_jobs import queued_runs
from segalign.launch.slurm.slurm_records import load_records
from segalign.run_directory import checkpoint_path

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("_on_cluster")]

STEPS = 12
PERMISSIONS = ("--allow_import=toy_house", "--allow_import=toy_crash")


class StudyCommands:
    """A study of the toy run, and the commands on it.

    Args:
        folder: Where everything of it goes.
        main: Path of ``main.py``.
        toy_config: Config of the toy run.
        callbacks: What its runs have besides, as a config names it.
        settings: Keys of the study.
    """

    def __init__(self, folder: Path, main: Path, toy_config: Path, callbacks: list, **settings):
        self.main, self.root = main, folder
        config = yaml.safe_load(toy_config.read_text())
        config["trainer"]["callbacks"] += callbacks
        (folder / "base.yaml").write_text(yaml.safe_dump(config))
        self.file, self.folder = folder / "study.yaml", folder / "study"
        fixed = {
            "name": "toy",
            "base": [str(folder / "base.yaml")],
            "metrics": ["train/loss"],
            # Names of toy nodes do not resolve.
            "slurm": {"time": "10", "signal_seconds": 30, "setup": ["MASTER_ADDR=127.0.0.1"]},
            "folder": str(self.folder),
            "runs_folder": str(folder / "runs"),
        }
        self.file.write_text(yaml.safe_dump(fixed | settings))

    def __call__(self, command: str, *options: str) -> str:
        line = [sys.executable, str(self.main), "sweep", command, str(self.file), *options]
        done = subprocess.run(
            line,
            capture_output=True,
            text=True,
            cwd=self.root,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def runs(self) -> list[PlannedRun]:
        return list(Plan.load(self.folder).runs)

    def states(self) -> dict[tuple[str, int], RunState]:
        return {(run.label, run.seed): read_state(run.directory) for run in self.runs}

    def statuses(self) -> dict[tuple[str, int], str]:
        return {key: str(state.status) for key, state in self.states().items()}


def once(kind: str, marker: Path, at_step: int, seed: int) -> dict:
    arguments = {"at_step": at_step, "marker": str(marker), "seed": seed}
    return {"class_path": f"toy_crash.{kind}", "init_args": arguments}


def test_a_study_survives_crashes_and_a_preemption_and_is_never_run_twice(
    tmp_path, toy_config, repository, wait, send_signal, job_processes
):
    failed, killed, held = (tmp_path / name for name in ("failed", "killed", "held"))
    callbacks = [
        once("HoldOnce", held, at_step=3, seed=0),
        once("FailOnce", failed, at_step=7, seed=1),
        once("KillOnce", killed, at_step=8, seed=2),
    ]
    rate = "model.init_args.optimizer.init_args.lr"
    study = StudyCommands(
        tmp_path, repository / "main.py", toy_config, callbacks,
        arms={"slow": {rate: 0.01}, "fast": {rate: 0.02}}, seeds=[0, 1, 2],
    )  # fmt: skip
    study("run", "--slurm", *PERMISSIONS)
    assert len(queued_runs(study.folder)) == 6
    file = Path(f"{held}-0")
    wait(lambda: file.exists() and file.read_text())
    job = queued_runs(study.folder)[Path(file.read_text())]
    send_signal(job)
    wait(lambda: not queued_runs(study.folder))

    unfinished = {Path(f"{marker}-0").read_text() for marker in (failed, killed)}
    assert len(unfinished) == 2
    by_run = {str(run.directory): read_state(run.directory) for run in study.runs}
    assert {name for name, state in by_run.items() if state.status != "done"} == unfinished
    assert by_run[Path(f"{killed}-0").read_text()].exit_code in (-9, 137)
    assert [by_run[file.read_text()].attempt, len(by_run)] == [2, 6]

    study("resume")
    wait(lambda: not queued_runs(study.folder))
    assert set(study.statuses().values()) == {"done"}
    attempts = sorted(state.attempt for state in study.states().values())
    assert attempts == [1, 1, 1, 2, 2, 2]
    assert all(checkpoint_path(run.directory, STEPS).is_dir() for run in study.runs)
    assert [len(record.runs) for record in load_records(study.folder).values()] == [6, 2]

    assert "nothing to start" in study("run", "--slurm", *PERMISSIONS)
    assert len(load_records(study.folder)) == 2
    assert queued_runs(study.folder) == {}
    assert sorted(state.attempt for state in study.states().values()) == attempts
    assert job_processes() == []


def test_cancel_leaves_no_process(tmp_path, toy_config, repository, wait, job_processes):
    held = tmp_path / "held"
    study = StudyCommands(
        tmp_path, repository / "main.py", toy_config, [once("HoldOnce", held, at_step=7, seed=0)]
    )
    study("run", "--slurm", *PERMISSIONS)
    wait(Path(f"{held}-0").exists)
    assert "running" in study("status")
    assert len(job_processes()) >= 3
    study("cancel")
    assert job_processes() == []
    assert queued_runs(study.folder) == {}
    assert set(study.statuses().values()) == {"cancelled"}


def test_what_scancel_ends_does_not_put_itself_back(tmp_path, toy_config, repository, wait):
    # It is saved at the signal that its supervisor hands on, as if its nodes were taken away.
    held = tmp_path / "held"
    study = StudyCommands(
        tmp_path, repository / "main.py", toy_config, [once("HoldOnce", held, at_step=7, seed=0)]
    )
    study("run", "--slurm", *PERMISSIONS)
    wait(Path(f"{held}-0").exists)
    [job] = queued_runs(study.folder).values()
    subprocess.run(["scancel", job.partition("_")[0]], check=True)
    wait(lambda: not queued_runs(study.folder))
    [state] = study.states().values()
    assert (state.status, state.attempt) == ("preempted", 1)
    study("resume")
    wait(lambda: not queued_runs(study.folder))
    [state] = study.states().values()
    assert (state.status, state.attempt) == ("done", 2)
