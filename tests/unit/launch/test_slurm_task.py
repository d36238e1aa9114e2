"""What one task of an array does with its runs, in real processes."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segalign.errors import DataError
from segalign.launch.running.cancel_request import request_cancel
from segalign.launch.running.execute import execute_run
from segalign.launch.running.run_folder import config_file, sweep_folder
from segalign.launch.running.run_state import read_state
from segalign.launch.slurm.slurm_task import run_task


@pytest.fixture
def make_runs(tmp_path):
    """Prepare runs that end with these codes, and the file that names them."""

    def make(*codes: int) -> tuple[Path, list[Path]]:
        directories = []
        for number, code in enumerate(codes):
            directory = tmp_path / "runs" / f"{number:012x}"
            sweep_folder(directory).mkdir(parents=True)
            spec = {"run_id": directory.name, "stages": ["fit"], "max_steps": 1}
            (sweep_folder(directory) / "spec.json").write_text(json.dumps(spec))
            settings = {"run_dir": str(directory), "seconds": 0, "code": code}
            config_file(directory, "fit").write_text(json.dumps(settings))
            directories.append(directory)
        file = tmp_path / "001.runs"
        file.write_text("".join(f"{directory}\n" for directory in directories))
        return file, directories

    return make


@pytest.fixture
def run(repository):
    program = (sys.executable, str(repository / "tests/toys/toy_job.py"))

    def run(file: Path, task: int, per_task: int, **settings) -> int:
        return run_task(file, task, program, runs_per_task=per_task, **settings)

    return run


def num_lives(directory: Path) -> int:
    file = directory / "lives-None"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_task_makes_its_own_runs_alone(make_runs, run):
    file, directories = make_runs(0, 0, 0)
    assert run(file, 1, 2) == 0
    assert [num_lives(directory) for directory in directories] == [0, 0, 1]
    assert run(file, 0, 2) == 0
    assert [num_lives(directory) for directory in directories] == [1, 1, 1]


def test_a_run_that_fails_stops_no_other_and_is_told(make_runs, run):
    file, directories = make_runs(9, 0, 8)
    assert run(file, 0, 3) == 9
    assert [num_lives(directory) for directory in directories] == [1, 1, 1]


def test_a_run_that_cannot_be_started_stops_no_other(make_runs, run, capsys):
    file, directories = make_runs(0, 0)
    request_cancel(directories[0])
    assert run(file, 0, 2) == 78
    assert [num_lives(directory) for directory in directories] == [0, 1]
    assert "was cancelled" in capsys.readouterr().err


def test_a_task_that_comes_back_leaves_out_what_is_done(make_runs, run):
    file, directories = make_runs(0, 0)
    assert run(file, 0, 1) == 0
    assert run(file, 0, 2) == 0
    assert [num_lives(directory) for directory in directories] == [1, 1]


def test_a_preempted_run_ends_the_task(make_runs, run):
    file, directories = make_runs(85, 0)
    assert run(file, 0, 2) == 85
    assert [num_lives(directory) for directory in directories] == [1, 0]
    assert read_state(directories[0]).status == "preempted"


def test_a_run_that_is_cancelled_ends_no_other(make_runs, run, monkeypatch):
    file, directories = make_runs(0, 0)
    settings = {"run_dir": str(directories[0]), "seconds": 60, "code": 0}
    config_file(directories[0], "fit").write_text(json.dumps(settings))
    quick = functools.partial(execute_run, heartbeat_seconds=0.2)
    monkeypatch.setattr("segalign.launch.slurm.slurm_task.execute_run", quick)
    lives, cancel = directories[0] / "lives-None", sweep_folder(directories[0]) / "cancel"
    waiting = f"until [ -e {lives} ]; do sleep 0.05; done; touch {cancel}"
    with subprocess.Popen(["bash", "-c", waiting]):
        assert run(file, 0, 2) == 143
    assert [read_state(one).status for one in directories] == ["cancelled", "done"]


def test_a_signal_between_two_runs_keeps_the_next_from_starting(make_runs, run, monkeypatch):
    file, directories = make_runs(0, 0)

    def execute(run_dir, *arguments, **settings):
        code = execute_run(run_dir, *arguments, **settings)
        os.kill(os.getpid(), signal.SIGUSR1)
        return code

    asked = []
    monkeypatch.setattr("segalign.launch.slurm.slurm_task.execute_run", execute)
    monkeypatch.setattr("segalign.launch.running.attempt.requeue", asked.append)
    assert run(file, 0, 2, preempting_signal="USR1") == 85
    assert [read_state(one).status for one in directories] == ["done", "preempted"]
    assert ([num_lives(one) for one in directories], asked) == ([1, 0], [20])


def test_options_and_launcher_reach_the_runs(make_runs, run):
    file, directories = make_runs(0)
    launcher = ("env", "SLURM_PROCID=3")
    assert run(file, 0, 1, options=["--allow_import=toys"], launcher=launcher) == 0
    assert json.loads((directories[0] / "lives-3").read_text())[-1] == "--allow_import=toys"


def test_a_launcher_that_is_ended_and_says_that_all_is_well_is_not_believed(
    make_runs, repository, tmp_path
):
    # So does srun if it is ended while its processes still save what they have.
    file, [directory] = make_runs(0)
    settings = {"run_dir": str(directory), "seconds": 60, "code": 0}
    config_file(directory, "fit").write_text(json.dumps(settings))
    launcher = tmp_path / "launcher"
    launcher.write_text("#!/bin/bash\ntrap 'exit 0' TERM\n\"$@\" & wait\n")
    launcher.chmod(0o755)
    program = [sys.executable, str(repository / "tests/toys/toy_job.py")]
    options = ["--runs-file", str(file), "--task", "0", "--launcher", str(launcher)]
    task = subprocess.Popen(
        [*program, "sweep", "execute", *options], env={**os.environ, "PYTHONPATH": str(repository)}
    )
    while num_lives(directory) == 0:
        assert task.poll() is None
        time.sleep(0.02)
    task.terminate()
    assert task.wait(30) == 85
    assert read_state(directory).status == "preempted"


def test_a_task_without_runs_is_told(make_runs, run, tmp_path):
    file, _ = make_runs(0)
    with pytest.raises(DataError, match=r"task 1 .* 1 lines"):
        run(file, 1, 1)
    with pytest.raises(DataError, match="cannot be read"):
        run(tmp_path / "none.runs", 0, 1)
