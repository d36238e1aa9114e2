"""Runs on this machine are neither lost nor doubled, whatever is killed."""

import os
import random
import signal
import subprocess
import time
from dataclasses import replace

import psutil
import pytest
from toy_processes import PROGRAM, events, kill_left, processes_of, start, wait_until
from toy_program import planned, prepare

from segalign.launch.running.cancel_request import is_cancel_requested, request_cancel
from segalign.launch.running.cancelling import cancel_local
from segalign.launch.running.local_controller import run_local
from segalign.launch.running.observing import observe
from segalign.launch.running.run_folder import sweep_folder
from segalign.launch.running.run_lock import run_lock
from segalign.launch.running.run_state import RunState, RunStatus, read_state, write_state
from segalign.run_directory import list_checkpoints


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path):
    yield
    left = processes_of(tmp_path)
    kill_left(tmp_path)
    assert left == []


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs"
    path.mkdir()
    return path


def control(folder, num_parallel=2, options=()):
    """Run all in this process; returns the statuses that each run went through."""
    seen: dict[str, list[str]] = {}
    run_local(
        planned(folder),
        PROGRAM,
        num_parallel=num_parallel,
        options=options,
        on_change=lambda one: seen.setdefault(one.run.run_id, []).append(str(one.status)),
    )
    return seen


def statuses(folder) -> list[str]:
    return [str(one.status) for one in observe(planned(folder))]


def num_steps(folder) -> int:
    return sum(len(list_checkpoints(path)) for path in folder.iterdir())


def assert_each_done_once(folder, stages=("fit",)):
    for path in folder.iterdir():
        state = read_state(path)
        assert (state.status, state.attempt) == (RunStatus.DONE, 1), path.name
        expected = [f"{word} {stage}" for stage in stages for word in ("begin", "end")]
        assert events(path) == expected
        assert not (path / "doubled").exists()


def test_all_runs_are_done_and_told(folder):
    for name in "abc":
        prepare(folder / name, ("fit", "test"), steps=4, seconds=0.1)
    seen = control(folder)
    assert_each_done_once(folder, ("fit", "test"))
    assert seen == {name: ["running", "done"] for name in "abc"}
    assert control(folder) == {}
    assert_each_done_once(folder, ("fit", "test"))


def test_no_more_run_at_once_than_allowed(folder):
    for name in "abcd":
        prepare(folder / name, steps=5, seconds=0.1)
    with start("control", folder, 2) as controller:
        most = 0
        while controller.poll() is None:
            most = max(most, statuses(folder).count("running"))
    assert most == 2


def test_failures_leave_the_others_alone(folder):
    prepare(folder / "a", answer=[78, "done"])
    prepare(folder / "b", answer="raise")
    prepare(folder / "c")
    control(folder, 1)
    assert statuses(folder) == ["failed", "failed", "done"]
    assert [read_state(folder / name).attempt for name in "abc"] == [1, 1, 1]
    control(folder, 1)  # asked for again, they are run again
    assert statuses(folder) == ["done", "failed", "done"]
    assert [read_state(folder / name).attempt for name in "abc"] == [2, 2, 1]


def test_a_directory_that_another_config_has_used_fails_and_the_others_go_on(folder):
    prepare(folder / "a", seed_everything=1)
    prepare(folder / "b")
    (folder / "a/config.yaml").write_text("seed_everything: 2\n")
    for attempt in (1, 2):
        control(folder, 1)
        assert statuses(folder) == ["failed", "done"]
        state = read_state(folder / "a")
        assert (state.attempt, state.exit_code) == (attempt, 78)
        assert "`seed_everything` is `2` there and `1` here" in state.reason
    assert events(folder / "a") == []
    (folder / "a/config.yaml").unlink()
    control(folder, 1)
    assert statuses(folder) == ["done", "done"]


def test_preempted_runs_go_on(folder):
    prepare(folder / "a", answer=[85, 85, "done"])
    prepare(folder / "b", answer=86)
    control(folder)
    assert statuses(folder) == ["done", "pruned"]
    assert read_state(folder / "a").attempt == 3


def test_restarts_without_progress_have_an_end(folder):
    prepare(folder / "a", answer=85)
    prepare(folder / "b")
    seen = control(folder, 1)
    assert statuses(folder) == ["failed", "done"]
    assert seen["a"][-1] == "failed"
    assert events(folder / "a").count("begin fit") == 4
    assert "4 times without a new checkpoint" in read_state(folder / "a").reason


def test_restarts_with_progress_have_none(folder):
    # Each attempt makes one checkpoint.
    prepare(folder / "a", steps=1, answer=85)
    prepare(folder / "z")
    with start("control", folder, 1):
        for attempt in range(1, 8):
            wait_until(lambda n=attempt: events(folder / "a").count("answer 85") >= n)
            (folder / "a/checkpoints" / f"step-{10 + attempt:08d}").mkdir()
        wait_until(lambda: statuses(folder)[0] == "failed")
    assert events(folder / "a").count("begin fit") >= 10


def test_supervisors_of_others_are_waited_for(folder):
    prepare(folder / "a")
    prepare(folder / "b", steps=20, seconds=0.1)
    other = start("sweep", "execute", folder / "b")
    wait_until(lambda: statuses(folder)[1] == "running")
    seen = control(folder, 1)
    assert seen == {"b": ["done"], "a": ["running", "done"]}
    assert_each_done_once(folder)
    # One at a time: the other's counts.
    assert read_state(folder / "a").started >= read_state(folder / "b").ended
    assert other.wait() == 0


def test_two_controllers_at_once_double_nothing(folder):
    for number in range(8):
        prepare(folder / f"{number}", steps=2)
    prepare(folder / "fails", steps=2, answer=65)
    with start("control", folder, 3) as one, start("control", folder, 3) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    assert read_state(folder / "fails").attempt == 1
    assert statuses(folder) == ["done"] * 8 + ["failed"]
    for path in folder.iterdir():
        assert events(path).count("begin fit") == 1


NUM_KILLS = 20


def test_a_controller_killed_at_random_times_loses_and_doubles_nothing(folder, seed):
    for number in range(12):
        prepare(folder / f"{number:02d}", ("fit", "test"), steps=30, seconds=0.02)
    # The moments are drawn in progress, so that a slow machine sees the same kills.
    moments = random.Random(seed)
    total = 12 * 30
    for kill in range(NUM_KILLS):
        wanted = min(moments.randint(1, total // NUM_KILLS) + num_steps(folder), total - 1)
        controller = start("control", folder, 2)
        wait_until(lambda n=wanted: num_steps(folder) >= n)
        time.sleep(moments.uniform(0, 0.05))
        assert controller.poll() is None, f"ended before kill {kill}"
        os.killpg(controller.pid, signal.SIGKILL)
        controller.wait()
    with start("control", folder, 2) as controller:
        assert controller.wait() == 0
    assert_each_done_once(folder, ("fit", "test"))


def kill_one(processes, moments):
    for process in moments.sample(processes, k=min(1, len(processes))):
        process.kill()


def test_anything_killed_at_random_times_loses_and_doubles_nothing(folder, seed):
    for number in range(4):
        prepare(folder / f"{number}", steps=25, seconds=0.02)
    moments = random.Random(seed)
    for _ in range(10):
        controller = start("control", folder, 2)
        wanted = num_steps(folder) + moments.randint(1, 10)
        wait_until(lambda c=controller, n=wanted: c.poll() is not None or num_steps(folder) >= n)
        kill_one(processes_of(folder), moments)
        controller.kill()
        controller.wait()
    for _ in range(4):  # a killed child is a failure, which each start repeats once
        with start("control", folder, 2) as controller:
            controller.wait()
        if set(statuses(folder)) == {"done"}:
            break
    assert statuses(folder) == ["done"] * 4
    assert num_steps(folder) == 100
    assert [path.name for path in folder.iterdir() if (path / "doubled").exists()] == []


def test_a_killed_supervisor_is_replaced_when_its_child_has_ended(folder):
    prepare(folder / "a", steps=20, seconds=0.1)
    with start("control", folder, 1) as controller:
        wait_until(lambda: num_steps(folder) > 1)
        psutil.Process(read_state(folder / "a").pid).kill()
        assert controller.wait() == 0
    assert statuses(folder) == ["done"]
    assert read_state(folder / "a").attempt == 2
    assert not (folder / "a/doubled").exists()
    assert num_steps(folder) == 20


def test_a_killed_supervisor_and_child_are_replaced_at_once(folder):
    prepare(folder / "a", steps=20)
    with start("control", folder, 1) as controller:
        wait_until(lambda: num_steps(folder) > 1)
        supervisor = psutil.Process(read_state(folder / "a").pid)
        doomed = [supervisor, *supervisor.children(recursive=True)]
        for process in doomed:
            process.kill()
        assert controller.wait() == 0
    assert (statuses(folder), num_steps(folder)) == (["done"], 20)


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_controller_that_is_asked_to_stop_stops_its_runs(folder, name):
    for run in "abc":
        prepare(folder / run, steps=30, worker=True)
    controller = start("control", folder, 2, log=subprocess.PIPE)
    wait_until(lambda: num_steps(folder) > 4)
    controller.send_signal(signal.Signals[f"SIG{name}"])
    output = controller.communicate()[0].decode()
    assert controller.returncode == 85
    last = output.splitlines()[-1]
    assert last.startswith("stopped: 2 runs were stopped and 1 wait")
    assert "Traceback" not in output
    assert statuses(folder) == ["preempted", "preempted", "pending"]
    assert processes_of(folder) == []
    control(folder)
    assert (statuses(folder), num_steps(folder)) == (["done"] * 3, 90)


def test_a_second_signal_kills(folder):
    prepare(folder / "a", steps=100_000, ignores_sigterm=True, worker=True)
    controller = start("control", folder, 1, TOY_GRACE="600")
    wait_until(lambda: num_steps(folder) > 1)
    controller.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert processes_of(folder / "a")
    controller.send_signal(signal.SIGINT)
    assert controller.wait(timeout=60) == 85
    assert processes_of(folder) == []


def test_cancel_leaves_no_process(folder):
    prepare(folder / "a", steps=1000, worker=True)
    prepare(folder / "b", steps=1000, worker=True, ignores_sigterm=True)
    prepare(folder / "c")
    prepare(folder / "done")
    control_one = planned(folder)[3:]
    run_local(control_one, PROGRAM, num_parallel=1)
    controller = start("control", folder, 2)
    wait_until(lambda: all(list_checkpoints(folder / name) for name in "ab"))
    assert len(cancel_local(planned(folder))) == 2
    assert controller.wait() == 0  # it has nothing left to do
    assert processes_of(folder) == []
    assert statuses(folder) == ["cancelled"] * 3 + ["done"]
    assert [read_state(folder / name).status for name in "ab"] == [RunStatus.CANCELLED] * 2
    assert events(folder / "c") == []
    assert len(cancel_local(planned(folder))) == 0


def test_cancelled_runs_can_be_started_again(folder):
    prepare(folder / "a", steps=3)
    prepare(folder / "b", steps=3)
    write_state(folder / "a", RunState(status=RunStatus.CANCELLED))
    request_cancel(folder / "a")
    request_cancel(folder / "b")
    control(folder)
    assert statuses(folder) == ["done", "done"]


def test_cancel_finds_children_whose_supervisor_was_killed(folder):
    prepare(folder / "a", steps=1000, worker=True)
    supervisor = start("sweep", "execute", folder / "a")
    wait_until(lambda: num_steps(folder) > 0)
    supervisor.kill()
    supervisor.wait()
    assert statuses(folder) == ["running"]
    assert len(cancel_local(planned(folder))) == 1
    assert processes_of(folder) == []
    assert read_state(folder / "a").status is RunStatus.CANCELLED


def test_cancel_finds_supervisors_that_are_only_starting(folder):
    # The state tells nothing of it yet, and the next thing that it does is to take the lock.
    prepare(folder / "a", steps=1000)
    supervisor = start("sweep", "execute", folder / "a")
    cancel_local(planned(folder))
    assert processes_of(folder) == []
    supervisor.wait()
    assert statuses(folder) == ["cancelled"]
    assert is_cancel_requested(folder / "a")


def test_cancel_spares_a_process_that_got_the_number_of_a_supervisor(folder):
    prepare(folder / "a")
    innocent = subprocess.Popen(["sleep", "60"])
    state = RunState(
        status=RunStatus.RUNNING,
        host=os.uname().nodename,
        pid=innocent.pid,
        pid_created=psutil.Process(innocent.pid).create_time(),
    )
    write_state(folder / "a", state)  # the lock is free
    cancel_local(planned(folder))
    assert innocent.poll() is None
    (sweep_folder(folder / "a") / "cancel").unlink()
    write_state(folder / "a", replace(state, pid_created=state.pid_created - 3600))
    with run_lock(folder / "a"):
        cancel_local(planned(folder))
    assert innocent.poll() is None
    innocent.kill()
    innocent.wait()


def test_a_failed_run_stays_failed_when_the_rest_is_cancelled(folder):
    prepare(folder / "a", answer=65)
    control(folder)
    cancel_local(planned(folder))
    assert statuses(folder) == ["failed"]
    assert read_state(folder / "a").reason == "the toy ends with 65."


def test_a_supervisor_that_breaks_is_a_failure(folder):
    prepare(folder / "a")
    assert control(folder, options=["--broken-supervisor"]) == {"a": ["failed"]}
    assert read_state(folder / "a").reason == "RuntimeError: the supervisor is broken"


def test_a_run_that_cannot_be_written_leaves_the_others_alone(folder):
    for name in "abc":
        prepare(folder / name)
    # Nothing can be renamed over a folder; root may write anywhere else.
    (sweep_folder(folder / "a") / "state.json").mkdir()
    (sweep_folder(folder / "b") / "supervisor.log").mkdir()
    with pytest.raises(
        OSError, match="the first `a`, seed 0: expected to be able to write"
    ) as raised:
        control(folder)
    assert "\n" not in str(raised.value)
    assert statuses(folder)[1:] == ["failed", "done"]
    assert "supervisor.log" in read_state(folder / "b").reason


def test_a_directory_of_another_config_leaves_the_others_alone(folder):
    for name in "ab":
        prepare(folder / name)
    spec = sweep_folder(folder / "a") / "spec.json"
    spec.write_text(spec.read_text().replace('"run_id": "a"', '"run_id": "other"'))
    control(folder)
    assert statuses(folder) == ["failed", "done"]
    assert "is that of config other" in observe(planned(folder))[0].state.reason
    assert read_state(folder / "a") is None


def test_runs_take_no_part_in_a_job_around_them(folder):
    prepare(folder / "a")
    with start("control", folder, 1, SLURM_JOB_ID="5", SLURM_NTASKS="2") as controller:
        assert controller.wait() == 0
    assert events(folder / "a") == ["begin fit", "end fit"]
    assert read_state(folder / "a").job is None
