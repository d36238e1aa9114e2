"""A study on this machine, as a user starts it: interrupted, gone on with, and not repeated."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from segalign.launch.plan import Plan
from segalign.launch.running.run_folder import STATE_FILE, sweep_folder
from segalign.launch.running.run_state import RunStatus, read_state

pytestmark = pytest.mark.e2e

STUDY = """\
name: toys
base: {base}
grid: {{vars.lr: [0.01]}}
seeds: [0, 1, 2]
metrics: [{{name: train/loss, mode: min}}, train/lost]
folder: {folder}/study
runs_folder: {folder}/runs
"""
NUM_STEPS = 12


@pytest.fixture
def study(tmp_path, toy_config) -> Path:
    path = tmp_path / "toys.yaml"
    path.write_text(STUDY.format(base=toy_config, folder=tmp_path))
    return path


@pytest.fixture
def start(repository, tmp_path):
    """Start ``main.py sweep``; whatever the test leaves is killed."""
    toys = os.pathsep.join([str(repository), str(repository / "tests/toys")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": toys}

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, str(repository / "main.py"), "sweep", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=repository,
        )

    yield start
    for process in processes_of(tmp_path):
        process.kill()


def processes_of(folder):
    def is_one(process):
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            return alive and any(str(folder) in word for word in process.cmdline())
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if is_one(process)]


def losses(run_dir) -> list[int]:
    path = run_dir / "losses.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["batch"] for line in lines]


def test_a_study_survives_its_controller_and_is_not_repeated(start, study, tmp_path):
    options = ("run", study, "--local", 2, "--allow_import", "toy_house")
    first = start(*options)
    deadline = time.monotonic() + 300
    while not any(losses(path) for path in (tmp_path / "runs").glob("*")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.communicate()

    second = start(*options)
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert "3 of 3 done" in output
    assert "note: expected a metric" in output
    assert "no finished run has `train/lost`: near it are `train/loss`" in output
    runs = [run.directory for run in Plan.load(tmp_path / "study").runs]
    assert len(runs) == len(set(runs)) == 3
    for run_dir in runs:
        state = read_state(run_dir)
        assert (state.status, state.attempt) == (RunStatus.DONE, 1)
        assert losses(run_dir) == list(range(NUM_STEPS))  # no step is lost, none repeated
    assert processes_of(tmp_path / "runs") == []

    written = [(sweep_folder(run_dir) / STATE_FILE).stat().st_mtime_ns for run_dir in runs]
    third = start(*options)
    output = third.communicate()[0]
    assert third.returncode == 0, output
    assert "nothing to start" in output
    again = [(sweep_folder(run_dir) / STATE_FILE).stat().st_mtime_ns for run_dir in runs]
    assert again == written

    status = start("status", study).communicate()[0]
    assert "3 of 3 done" in status
    assert "no finished run has `train/lost`" in status
    assert status.count(f"{NUM_STEPS}/{NUM_STEPS}") == 3
