"""What runs look like from outside."""

import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from toy_program import planned, prepare

from segalign.launch.running.cancel_request import request_cancel
from segalign.launch.running.heartbeat import start_heartbeat
from segalign.launch.running.metrics_tail import logged_step
from segalign.launch.running.observing import observe
from segalign.launch.running.run_folder import HEARTBEAT_FILE, sweep_folder
from segalign.launch.running.run_lock import run_lock
from segalign.launch.running.run_state import RunState, RunStatus, read_state, write_state

HERE = os.uname().nodename


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def one(folder):
    return prepare(folder / "a", steps=40)


def look(folder, **queued):
    (observed,) = observe(planned(folder), {folder / name: job for name, job in queued.items()})
    return observed


def write(run_dir, status, **settings):
    write_state(run_dir, RunState(status=status, host=HERE, **settings))


def beat_before(run_dir, seconds, every=1.0):
    start_heartbeat(run_dir, every)
    moment = time.time() - seconds
    os.utime(sweep_folder(run_dir) / HEARTBEAT_FILE, (moment, moment))


def log_metrics(run_dir, text):
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "logs/metrics.csv").write_text(text, newline="")


def test_a_run_that_was_never_started(folder, one):
    observed = look(folder)
    assert (observed.status, observed.state, observed.step) == (RunStatus.PENDING, None, None)
    assert observed.max_steps == 40


@pytest.mark.parametrize("status", ["preempted", "failed", "cancelled", "pruned", "done"])
def test_ends_are_taken_from_the_file(folder, one, status):
    write(one, RunStatus(status))
    assert look(folder).status == status


def test_running_is_who_holds_the_lock(folder, one):
    write(one, RunStatus.RUNNING)
    beat_before(one, 3600)
    with run_lock(one):
        assert look(folder).status is RunStatus.RUNNING
    beat_before(one, 0)
    assert look(folder).status is RunStatus.DEAD


@pytest.mark.parametrize("before", [None, "failed", "preempted"])
def test_a_supervisor_that_has_written_nothing_yet_runs(folder, one, before):
    if before is not None:
        write(one, RunStatus(before))
    with run_lock(one):
        assert look(folder).status is RunStatus.RUNNING


@pytest.mark.parametrize(("seconds", "expected"), [(3.5, "running"), (4.5, "dead")])
def test_on_another_machine_the_heartbeat_tells(folder, one, seconds, expected):
    write_state(one, RunState(status=RunStatus.RUNNING, host="elsewhere"))
    beat_before(one, seconds)
    assert look(folder).status == expected


@pytest.mark.parametrize(("seconds", "expected"), [(3.5, "running"), (4.5, "dead")])
def test_a_lock_of_another_machine_may_outlive_it(folder, one, seconds, expected):
    write_state(one, RunState(status=RunStatus.RUNNING, host="elsewhere"))
    beat_before(one, seconds)
    with run_lock(one):
        assert look(folder).status == expected
        beat_before(one, 5)
        assert look(folder, a="5_0").status is RunStatus.QUEUED


@pytest.mark.parametrize(("seconds", "expected"), [(1, "running"), (5, "dead")])
def test_without_locks_the_heartbeat_tells(folder, one, seconds, expected, monkeypatch):
    write(one, RunStatus.RUNNING)
    beat_before(one, seconds)
    monkeypatch.setattr("segalign.launch.running.observing.is_locked", lambda run_dir: None)
    assert look(folder).status == expected


@pytest.mark.parametrize(
    ("status", "job", "expected"),
    [
        (None, None, "queued"),
        ("preempted", "5_0", "queued"),
        ("running", "5_0", "queued"),  # its node went down, and the job is requeued
        ("failed", "5_0", "failed"),  # the job goes on with other runs
        ("failed", "4_0", "queued"),
        ("done", "5_0", "done"),
    ],
)
def test_the_queue_of_a_cluster_counts(folder, one, status, job, expected):
    if status is not None:
        write(one, RunStatus(status), job=job)
    assert look(folder, a="5_0").status == expected


def test_a_queued_run_that_runs_is_running(folder, one):
    write_state(one, RunState(status=RunStatus.RUNNING, host="elsewhere", job="5_0"))
    beat_before(one, 0)
    assert look(folder, a="5_0").status is RunStatus.RUNNING


def test_a_request_to_cancel_counts_for_what_would_go_on(folder, one):
    request_cancel(one)
    assert look(folder).status is RunStatus.CANCELLED
    assert look(folder, a="5").status is RunStatus.CANCELLED
    write(one, RunStatus.PREEMPTED)
    assert look(folder).status is RunStatus.CANCELLED
    write(one, RunStatus.FAILED)
    assert look(folder).status is RunStatus.FAILED
    with run_lock(one):
        assert look(folder).status is RunStatus.RUNNING


def test_a_run_that_ends_meanwhile_is_not_taken_for_dead(folder, one, monkeypatch):
    write(one, RunStatus.RUNNING)

    def ends(run_dir):
        write(one, RunStatus.DONE)
        return False

    monkeypatch.setattr("segalign.launch.running.observing.is_locked", ends)
    assert look(folder).status is RunStatus.DONE


def test_the_step_is_that_of_the_last_whole_row(tmp_path):
    assert logged_step(tmp_path) is None
    log_metrics(tmp_path, "step,epoch,loss\r\n")
    assert logged_step(tmp_path) is None
    rows = "".join(f"{step},0,{'1' * 60}\r\n" for step in range(1000))
    log_metrics(tmp_path, f"step,epoch,loss\r\n{rows}")
    assert logged_step(tmp_path) == 1000
    log_metrics(tmp_path, f"step,epoch,loss\r\n{rows}10")
    assert logged_step(tmp_path) == 1000
    log_metrics(tmp_path, 'epoch,"a,b",step\r\n0,,7\r\n')
    assert logged_step(tmp_path) == 8
    log_metrics(tmp_path, "something else\n1\n")
    assert logged_step(tmp_path) is None
    log_metrics(tmp_path, "")
    assert logged_step(tmp_path) is None


def test_slow_is_told_from_dead(folder, one):
    write(one, RunStatus.RUNNING, started="2020-01-01T00:00:00+00:00")
    log_metrics(one, "step,epoch\r\n11,0\r\n")
    moment = time.time() - 900
    os.utime(one / "logs/metrics.csv", (moment, moment))
    with run_lock(one):
        beat_before(one, 2)
        observed = look(folder)
    assert observed.status is RunStatus.RUNNING
    assert (observed.step, observed.max_steps) == (12, 40)
    assert 2 <= observed.beat_age < 60
    assert 900 <= observed.progress_age < 960


def test_progress_counts_from_the_start_of_an_attempt(folder, one):
    log_metrics(one, "step,epoch\r\n11,0\r\n")
    os.utime(one / "logs/metrics.csv", (0, 0))
    with run_lock(one):
        write(one, RunStatus.RUNNING, started="2020-01-01T00:00:00+00:00")
        assert look(folder).progress_age > 3600
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        write(one, RunStatus.RUNNING, started=now)
        assert look(folder).progress_age < 60
        write(one, RunStatus.RUNNING, started=now, stages_done=("fit",))
        assert look(folder).progress_age is None


def test_a_directory_of_another_config_is_a_failure(folder, one):
    one.rename(folder / "b")
    observed = look(folder)
    assert observed.status is RunStatus.FAILED
    assert "is that of config a" in observed.state.reason
    write(folder / "b", RunStatus.DONE)
    assert look(folder).status is RunStatus.FAILED


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running"}', '{"status": "x"}'])
def test_a_damaged_state_is_none(folder, one, text):
    (sweep_folder(one) / "state.json").write_text(text)
    assert read_state(one) is None
    assert look(folder).status is RunStatus.PENDING


def test_only_the_end_of_a_log_is_read(tmp_path):
    log_metrics(tmp_path, "step,epoch\r\n" + "".join(f"{step},0\r\n" for step in range(300_000)))
    tracemalloc.start()
    assert logged_step(tmp_path) == 300_000
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


def test_a_thousand_runs(folder):
    rows = "step,epoch,loss\r\n" + "".join(f"{step},0,0.5\r\n" for step in range(1000))
    first = prepare(folder / "0000")
    write(first, RunStatus.PREEMPTED)
    start_heartbeat(first, 1.0)
    with run_lock(first):
        pass
    log_metrics(first, rows)
    spec = (sweep_folder(first) / "spec.json").read_text()
    for number in range(1, 1000):
        other = shutil.copytree(first, folder / f"{number:04d}")
        (sweep_folder(other) / "spec.json").write_text(spec.replace("0000", other.name))
    runs = planned(folder)
    observed = observe(runs)
    assert {(one.status, one.step) for one in observed} == {(RunStatus.PREEMPTED, 3)}


def test_looking_imports_nothing_heavy():
    modules = ("observing", "local_controller", "execute", "status_table")
    imports = ";".join(f"import segalign.launch.running.{name}" for name in modules)
    heavy = "{'torch', 'numpy', 'lightning', 'omegaconf', 'jinja2'}"
    code = f"import sys;{imports};print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    output = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True)
    assert output == "[]\n"
