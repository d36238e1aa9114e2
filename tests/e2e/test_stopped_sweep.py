"""A run that is stopped in mid-training is no finished run, however it was stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from segalign.launch.running.run_state import RunState, RunStatus, read_state
from segalign.run_directory import list_checkpoints

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).parents[2]
LONG = 100_000


@pytest.fixture
def study(toy_config, tmp_path):
    content = {
        "base": str(toy_config),
        "settings": {
            "trainer.max_steps": LONG,
            "checkpoint.every_n_steps": 5,
            "trainer.enable_progress_bar": False,
        },
        "folder": str(tmp_path / "study"),
        "runs_folder": str(tmp_path / "runs"),
    }
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(study: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(REPOSITORY / "tests" / "toys")
    return subprocess.Popen(
        [sys.executable, "main.py", "sweep", *arguments[:1], str(study), *arguments[1:]],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def the_state(study: Path) -> RunState:
    (run,) = (study.parent / "runs").iterdir()
    state = read_state(run)
    assert state is not None
    return state


def test_stopped_runs_are_not_done(study):
    running = start(study, "run", "--local=1", "--allow_import=toy_house")
    deadline = time.monotonic() + 200
    while not any(list_checkpoints(run) for run in (study.parent / "runs").glob("*")):
        assert running.poll() is None, running.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    text, _ = running.communicate(timeout=120)
    assert running.returncode != 0, text
    assert the_state(study).status is RunStatus.PREEMPTED, text

    again = start(study, "resume")
    while the_state(study).attempt < 2:
        assert again.poll() is None, again.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    cancelled = start(study, "cancel")
    text, _ = cancelled.communicate(timeout=120)
    assert cancelled.returncode == 0, text
    again.communicate(timeout=120)
    assert the_state(study).status is RunStatus.CANCELLED, text
