"""A supervisor writes down how its run ends, whatever ends it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from toy_processes import PROGRAM, events, kill_left, processes_of, start, wait_until
from toy_program import prepare

from segalign.errors import ConfigError, StorageError
from segalign.launch.running.cancel_request import request_cancel
from segalign.launch.running.execute import execute_run
from segalign.launch.running.failure_reason import failure_reason, unmasked_code
from segalign.launch.running.heartbeat import start_heartbeat
from segalign.launch.running.run_claim import Claim, claim_attempt
from segalign.launch.running.run_folder import attempt_log, config_file, sweep_folder
from segalign.launch.running.run_lock import RunHeldError, run_lock
from segalign.launch.running.run_state import RunState, RunStatus, read_state, write_state
from segalign.launch.slurm.requeue import RequeueOutcome
from segalign.run_directory import list_checkpoints


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path):
    yield
    left = processes_of(tmp_path)
    kill_left(tmp_path)
    assert left == []


def execute(run_dir, **settings) -> int:
    return execute_run(run_dir, PROGRAM, heartbeat_seconds=0.3, grace_seconds=2.0, **settings)


def status(run_dir) -> RunStatus | None:
    state = read_state(run_dir)
    return None if state is None else state.status


def test_all_stages_are_run_once(run_dir):
    prepare(run_dir, ("fit", "test"), steps=1)
    assert execute(run_dir) == 0
    assert execute(run_dir) == 0
    assert events(run_dir) == ["begin fit", "end fit", "begin test", "end test"]
    state = read_state(run_dir)
    assert (state.status, state.attempt, state.exit_code) == (RunStatus.DONE, 1, 0)
    assert state.stages_done == ("fit", "test")
    assert state.pid_created == pytest.approx(psutil.Process().create_time())
    assert state.seconds > 0
    assert state.started <= state.ended


def test_a_failed_test_repeats_no_training(run_dir):
    prepare(run_dir, ("fit", "test"), steps=1, test={"answer": [None, 65, "done"]})
    assert execute(run_dir) == 65
    failed = read_state(run_dir)
    assert (failed.status, failed.stages_done) == (RunStatus.FAILED, ("fit",))
    assert failed.reason == "the toy ends with 65."
    assert execute(run_dir) == 0
    assert events(run_dir).count("begin fit") == 1
    done = read_state(run_dir)
    assert (done.status, done.attempt, done.reason) == (RunStatus.DONE, 2, "")
    assert done.seconds > failed.seconds


@pytest.mark.parametrize(
    ("answer", "code", "expected", "reason"),
    [
        (85, 85, RunStatus.PREEMPTED, "the toy ends with 85."),
        (86, 0, RunStatus.PRUNED, "the toy ends with 86."),
        (78, 78, RunStatus.FAILED, "the toy ends with 78."),
        ("raise", 1, RunStatus.FAILED, "RuntimeError: the toy is broken"),
        ("KILL", 137, RunStatus.FAILED, "killed by signal 9 (SIGKILL): out of memory?"),
        ("SEGV", 139, RunStatus.FAILED, "killed by signal 11 (SIGSEGV)"),
    ],
)
def test_each_end_has_its_status(run_dir, answer, code, expected, reason):
    prepare(run_dir, ("fit", "test"), steps=1, answer=answer, worker=True)
    assert execute(run_dir) == code
    state = read_state(run_dir)
    assert (state.status, state.reason) == (expected, reason)
    assert "begin test" not in events(run_dir)


def test_output_is_kept_by_attempt(run_dir):
    prepare(run_dir, steps=1, answer=[78, 65])
    execute(run_dir)
    execute(run_dir)
    texts = [attempt_log(run_dir, number).read_text() for number in (1, 2)]
    assert texts == ["error: the toy ends with 78.\n", "error: the toy ends with 65.\n"]


def test_reasons_are_found_in_what_programs_print(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: old\n")
    old = log.stat().st_size
    with log.open("a") as file:
        file.write("step 1\r1: error: of one rank\nsrun: error: node1: task 0: Exited\n")
    assert failure_reason(log, 78, old) == "of one rank"
    log.write_text(
        "Traceback (most recent call last):\n  File\nKeyError: 'a'\n\nDuring handling:\n"
        "Traceback (most recent call last):\n  File\n    ^^\ntorch.OutOfMemoryError: CUDA\n  more\n"
    )
    assert failure_reason(log, 1) == "torch.OutOfMemoryError: CUDA"
    assert failure_reason(log, 3, log.stat().st_size) == "ended with exit code 3 and no message"
    assert failure_reason(tmp_path / "none", 139) == "killed by signal 11 (SIGSEGV)"
    log.write_text("error: " + "x" * 10000)
    assert len(failure_reason(log, 1)) == 500


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("step 1\n", 143),
        ("old\n0: stopped: pruned by the searcher at step 2\n1: error: peer is gone\n", 86),
        ("stopped: SIGUSR1 came, and training ended after step 2\n", 85),
        ("stopped: something else\n", 143),
        ("error: no space\nsrun: error: node1: task 1: Terminated\n", 1),
        ("Traceback (most recent call last):\n  File\nKeyError: 'a'\n", 1),
        ("Traceback (most recent call last):\nRuntimeError: killed by signal: Terminated.\n", 143),
    ],
)
def test_a_launcher_does_not_hide_which_process_ended_first(tmp_path, text, code):
    log = tmp_path / "log"
    log.write_text(f"error: of a stage before\n{text}")
    start = len("error: of a stage before\n")
    assert unmasked_code(log, 143, start) == code
    assert unmasked_code(log, 78, start) == 78


def test_the_reason_of_a_stop_is_not_what_it_did_to_others(tmp_path):
    log = tmp_path / "log"
    log.write_text("stopped: pruned by the searcher at step 2\nerror: peer is gone\n")
    assert failure_reason(log, 86).startswith("pruned by")
    assert failure_reason(log, 78) == "peer is gone"


def test_options_and_launcher_are_handed_on(run_dir):
    prepare(run_dir, steps=1)
    shown = sweep_folder(run_dir) / "seen"
    code = f"import json, sys, os; json.dump(sys.argv[1:], open({str(shown)!r}, 'w'))"
    assert execute(run_dir, launcher=(sys.executable, "-c", code), options=["--a=1"]) == 0
    config = str(config_file(run_dir, "fit"))
    assert json.loads(shown.read_text()) == [*PROGRAM, "fit", "--config", config, "--a=1"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no readable"),
        ("{", "no readable"),
        ('{"run_id": "other", "stages": ["fit"]}', "is that of config other"),
    ],
)
def test_a_directory_of_another_config_is_refused(run_dir, content, found):
    prepare(run_dir)
    spec = sweep_folder(run_dir) / "spec.json"
    spec.unlink() if content is None else spec.write_text(content)
    with pytest.raises(ConfigError, match=found) as raised:
        execute(run_dir)
    assert "\n" not in str(raised.value)
    assert (status(run_dir), events(run_dir)) == (None, [])


def test_a_launcher_that_is_missing_is_one_line(run_dir):
    prepare(run_dir)
    with pytest.raises(ConfigError, match="able to start `no-such-launcher`"):
        execute(run_dir, launcher=["no-such-launcher"])
    assert status(run_dir) is RunStatus.FAILED
    assert "no-such-launcher" in read_state(run_dir).reason


def test_a_missing_config_is_one_line(run_dir):
    prepare(run_dir)
    config_file(run_dir, "fit").unlink()
    with pytest.raises(ConfigError, match=r"fit\.yaml"):
        execute(run_dir)


def test_nobody_runs_what_another_one_runs(run_dir):
    prepare(run_dir, steps=1000)
    other = start("sweep", "execute", run_dir)
    wait_until(lambda: "begin fit" in events(run_dir))
    with pytest.raises(RunHeldError):
        execute(run_dir)
    other.terminate()
    assert other.wait() == 143
    assert events(run_dir) == ["begin fit"]


def test_an_attempt_is_made_once(run_dir):
    # Two who saw the same failure start two supervisors: the slower one finds a new failure.
    prepare(run_dir, steps=1, answer=78)
    assert execute(run_dir, attempt=1) == 78
    with pytest.raises(RunHeldError, match=r"attempt 1 .*made"):
        execute(run_dir, attempt=1)
    assert execute(run_dir, attempt=2) == 78
    assert events(run_dir).count("begin fit") == 2


def test_a_child_whose_supervisor_was_killed_is_not_doubled(run_dir):
    prepare(run_dir, steps=12, seconds=0.2)
    killed = start("sweep", "execute", run_dir)
    wait_until(lambda: "begin fit" in events(run_dir))
    killed.kill()
    killed.wait()
    with pytest.raises(RunHeldError):
        execute(run_dir)
    wait_until(lambda: "end fit" in events(run_dir))
    wait_until(lambda: not processes_of(run_dir))
    assert status(run_dir) is RunStatus.RUNNING  # nobody was left to say more
    assert execute(run_dir) == 0
    assert read_state(run_dir).attempt == 2
    assert not (run_dir / "doubled").exists()


def test_a_killed_child_is_a_failure_that_can_be_repeated(run_dir):
    prepare(run_dir, steps=20)
    supervisor = start("sweep", "execute", run_dir)
    wait_until(lambda: len(list_checkpoints(run_dir)) > 1)
    child = psutil.Process(supervisor.pid).children()[0]
    child.kill()
    assert supervisor.wait() == 137
    assert "SIGKILL" in read_state(run_dir).reason
    assert execute(run_dir) == 0
    assert len(list_checkpoints(run_dir)) == 20


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130)])
@pytest.mark.parametrize("ignores_sigterm", [False, True])
def test_a_supervisor_that_is_asked_to_stop_leaves_a_run_that_can_go_on(
    run_dir, name, code, ignores_sigterm
):
    prepare(run_dir, steps=1000, worker=True, ignores_sigterm=ignores_sigterm)
    supervisor = start("sweep", "execute", run_dir)
    wait_until((run_dir / "worker_is_ready").exists)
    wait_until(lambda: list_checkpoints(run_dir))
    supervisor.send_signal(signal.Signals[f"SIG{name}"])
    assert supervisor.wait() == code
    assert status(run_dir) is RunStatus.PREEMPTED
    if ignores_sigterm:  # else all of it may end at once
        assert (run_dir / "worker_was_told").exists()


def test_signals_mean_afterwards_what_they_meant_before(run_dir):
    # A job may have several runs, one after another.
    prepare(run_dir, steps=1)
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(name) for name in names]
    assert execute(run_dir, preempting_signal="USR1") == 0
    assert [signal.getsignal(name) for name in names] == before


def test_a_signal_to_the_supervisor_is_handed_on(run_dir, monkeypatch):
    asked = requeues(monkeypatch)
    prepare(run_dir, steps=1000)
    code = f"import os, time; time.sleep(1); os.kill({os.getpid()}, {int(signal.SIGUSR1)})"
    with psutil.Popen([sys.executable, "-c", code]):
        assert execute(run_dir, preempting_signal="USR1") == 85
    assert (status(run_dir), asked) == (RunStatus.PREEMPTED, [20])


def test_a_run_that_is_cancelled_is_stopped_at_the_next_beat(run_dir):
    prepare(run_dir, steps=1000)
    supervisor = start("sweep", "execute", run_dir)
    wait_until(lambda: list_checkpoints(run_dir))
    request_cancel(run_dir)
    assert supervisor.wait(timeout=20) == 143
    assert status(run_dir) is RunStatus.CANCELLED
    with pytest.raises(ConfigError, match="was cancelled"):
        execute(run_dir)


def test_it_beats_while_it_runs(run_dir):
    prepare(run_dir, steps=30, seconds=0.1)
    supervisor = start("sweep", "execute", run_dir)
    heartbeat = sweep_folder(run_dir) / "heartbeat"
    wait_until(heartbeat.exists)
    first = heartbeat.stat().st_mtime
    wait_until(lambda: heartbeat.stat().st_mtime > first + 0.5)
    supervisor.wait()


def requeues(monkeypatch, is_possible=True):
    asked = []

    def requeue(max_requeues):
        asked.append(max_requeues)
        return RequeueOutcome(job="12_3", requeued=is_possible, reason="asked too often")

    for name in ("attempt", "execute"):
        monkeypatch.setattr(f"segalign.launch.running.{name}.requeue", requeue)
    return asked


@pytest.mark.parametrize("answer", ["USR1", 138])
def test_a_child_that_the_announcing_signal_ends_is_requeued(run_dir, monkeypatch, answer):
    asked = requeues(monkeypatch)
    prepare(run_dir, steps=1, answer=answer)
    assert execute(run_dir, preempting_signal="USR1", max_requeues=7) == 85
    state = read_state(run_dir)
    assert (state.status, asked) == (RunStatus.PREEMPTED, [7])
    assert state.reason == "ended by SIGUSR1 in stage fit; SLURM job 12_3 is back in the queue"


def test_another_signal_is_a_failure(run_dir, monkeypatch):
    asked = requeues(monkeypatch)
    prepare(run_dir, steps=1, answer="USR2")
    assert execute(run_dir, preempting_signal="USR1") == 128 + signal.SIGUSR2
    assert (status(run_dir), asked) == (RunStatus.FAILED, [])


def bash(script):
    """Make a launcher; what it launches is `"$@"`."""
    return ("bash", "-c", script, "launcher")


@pytest.mark.parametrize(
    ("answer", "launcher", "job", "expected"),
    [
        ("TERM", ("env",), "12", RunStatus.PREEMPTED),
        ("done", bash('"$@"; exit 143'), "12", RunStatus.PREEMPTED),
        ("TERM", ("env",), "", RunStatus.FAILED),
        ("TERM", (), "12", RunStatus.FAILED),
        ("KILL", ("env",), "12", RunStatus.FAILED),
        (78, bash('"$@"; exit 143'), "12", RunStatus.FAILED),
        ("raise", bash('"$@"; exit 143'), "12", RunStatus.FAILED),
    ],
)
def test_what_a_cluster_takes_away_without_notice_is_requeued(
    run_dir, monkeypatch, answer, launcher, job, expected
):
    asked = requeues(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    prepare(run_dir, steps=1, answer=answer)
    code = execute(run_dir, launcher=launcher, preempting_signal="USR1")
    is_back = expected is RunStatus.PREEMPTED
    assert (status(run_dir), asked, code == 85) == (expected, [20] * is_back, is_back)
    if answer == 78:
        assert read_state(run_dir).reason == "the toy ends with 78."


def told(seconds, name, pid=None):
    """Send a signal to this process after a while."""
    code = f"import os, time; time.sleep({seconds}); os.kill({pid or os.getpid()}, {int(name)})"
    return psutil.Popen([sys.executable, "-c", code])


def test_a_signal_at_the_end_of_a_stage_keeps_the_next_from_starting(run_dir, monkeypatch):
    asked = requeues(monkeypatch)
    prepare(run_dir, ("fit", "test"), steps=1)
    launcher = bash('trap "" USR1; "$@"; kill -USR1 $PPID; sleep 0.3')
    assert execute(run_dir, launcher=launcher, preempting_signal="USR1") == 85
    state = read_state(run_dir)
    assert (state.status, state.stages_done) == (RunStatus.PREEMPTED, ("fit",))
    assert "before stage test" in state.reason
    assert (events(run_dir), asked) == (["begin fit", "end fit"], [20])


def test_a_signal_at_the_very_end_changes_nothing(run_dir, monkeypatch):
    asked = requeues(monkeypatch)
    prepare(run_dir, steps=1)
    launcher = bash('trap "" USR1; "$@"; kill -USR1 $PPID; sleep 0.3')
    assert execute(run_dir, launcher=launcher, preempting_signal="USR1") == 0
    assert (status(run_dir), asked) == (RunStatus.DONE, [])


def test_a_signal_is_handed_on_as_often_as_it_comes(run_dir):
    prepare(run_dir)
    counting = f"trap 'echo >> {run_dir}/told' USR1; for i in 1 2; do kill -USR1 $PPID; "
    counting += "for k in 1 2 3 4 5; do sleep 0.1; done; done; exit 85"
    assert execute(run_dir, launcher=bash(counting), preempting_signal="USR1") == 85
    assert (run_dir / "told").read_text() == "\n\n"
    assert "came before" not in read_state(run_dir).reason


@pytest.mark.parametrize(("name", "code"), [("USR1", 85), ("TERM", 143)])
def test_a_signal_ends_the_wait_for_a_lock(run_dir, monkeypatch, name, code):
    asked = requeues(monkeypatch)
    prepare(run_dir)
    state = of_this_job(run_dir, monkeypatch)
    began = time.monotonic()
    with run_lock(run_dir), told(0.5, signal.Signals[f"SIG{name}"]):
        assert execute(run_dir, preempting_signal="USR1", lock_seconds=20) == code
    assert time.monotonic() - began < 15
    assert (read_state(run_dir), asked) == (state, [20] if code == 85 else [])
    assert events(run_dir) == []


def test_a_signal_ends_the_wait_for_a_beat(run_dir, monkeypatch):
    asked = requeues(monkeypatch)
    prepare(run_dir)
    as_of_another_machine(run_dir)
    start_heartbeat(run_dir, 1000.0)
    with told(0.5, signal.SIGUSR1):
        assert execute(run_dir, preempting_signal="USR1") == 85
    assert (asked, events(run_dir)) == ([20], [])


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_launched_stage_may_save_before_its_launcher_is_ended(run_dir, is_cancelled):
    prepare(run_dir)
    launcher = bash(
        f"trap 'echo > {run_dir}/saved; exit 85' USR1; trap 'exit 99' TERM; echo > {run_dir}/up; "
        "while :; do sleep 0.1; done"
    )
    if is_cancelled:
        told_by = bash_when(run_dir / "up", f"touch {sweep_folder(run_dir)}/cancel")
    else:
        told_by = bash_when(run_dir / "up", f"kill -TERM {os.getpid()}")
    with psutil.Popen(told_by):
        code = execute(run_dir, launcher=launcher, preempting_signal="USR1")
    ended = (RunStatus.CANCELLED, 143) if is_cancelled else (RunStatus.PREEMPTED, 85)
    assert (status(run_dir), code) == ended
    assert (run_dir / "saved").exists() is not is_cancelled


def bash_when(path, command):
    return ["bash", "-c", f"until [ -e {path} ]; do sleep 0.05; done; sleep 0.3; {command}"]


def test_a_launched_stage_that_does_not_save_is_ended(run_dir):
    prepare(run_dir)
    launcher = bash(
        f"trap 'echo >> {run_dir}/told' USR1; trap 'exit 99' TERM; "
        f"echo > {run_dir}/up; while :; do sleep 0.1; done"
    )
    with psutil.Popen(bash_when(run_dir / "up", f"kill -TERM {os.getpid()}")):
        assert execute(run_dir, launcher=launcher, preempting_signal="USR1") == 143
    assert (run_dir / "told").read_text() == "\n"
    assert status(run_dir) is RunStatus.PREEMPTED


def test_a_child_that_answers_is_requeued_by_itself(run_dir, monkeypatch):
    asked = requeues(monkeypatch)
    prepare(run_dir, steps=1, answer=85)
    assert execute(run_dir, preempting_signal="USR1") == 85
    assert (status(run_dir), asked) == (RunStatus.PREEMPTED, [])


def test_an_unknown_signal_is_one_line(run_dir):
    prepare(run_dir)
    with pytest.raises(ConfigError, match="such as `USR1`"):
        execute(run_dir, preempting_signal="HUP1")


def as_of_another_machine(run_dir, **changes):
    start_heartbeat(run_dir, 0.2)
    write_state(run_dir, RunState(status=RunStatus.RUNNING, host="elsewhere", **changes))


def test_a_run_of_another_machine_is_left_to_it_while_it_beats(run_dir):
    prepare(run_dir, steps=1)
    as_of_another_machine(run_dir)
    file = sweep_folder(run_dir) / "heartbeat"
    code = f"import os, time\nfor _ in range(100): os.utime({str(file)!r}); time.sleep(0.1)"
    with psutil.Popen([sys.executable, "-c", code]) as beating:
        with pytest.raises(RunHeldError):
            execute(run_dir)
        beating.kill()
    assert execute(run_dir) == 0  # it has stopped beating


def test_a_requeued_job_does_not_wait_for_its_old_self(run_dir, monkeypatch):
    prepare(run_dir, steps=1)
    as_of_another_machine(run_dir, job="12_3")
    start_heartbeat(run_dir, 1000.0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    began = time.monotonic()
    assert execute(run_dir) == 0
    assert time.monotonic() - began < 30
    assert read_state(run_dir).job == "12_3"


def of_this_job(run_dir, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    as_of_another_machine(run_dir, job="12")
    return read_state(run_dir)


def test_a_requeued_job_waits_for_the_lock_of_its_old_self(run_dir, monkeypatch):
    prepare(run_dir, steps=1)
    of_this_job(run_dir, monkeypatch)
    holding = f"exec 9>> {sweep_folder(run_dir)}/lock; flock 9; echo; exec sleep 2.5"
    with psutil.Popen(["bash", "-c", holding], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert execute(run_dir) == 0


def test_a_lock_that_stays_held_puts_its_job_back(run_dir, monkeypatch):
    asked = requeues(monkeypatch)
    prepare(run_dir, steps=1)
    state = of_this_job(run_dir, monkeypatch)
    with run_lock(run_dir):
        assert execute(run_dir, lock_seconds=0.2) == 85
        requeues(monkeypatch, is_possible=False)
        with pytest.raises(RunHeldError):
            execute(run_dir, lock_seconds=0.2)
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        requeues(monkeypatch)
        with pytest.raises(RunHeldError):
            execute(run_dir, lock_seconds=0.2)
    assert (read_state(run_dir), asked, events(run_dir)) == (state, [20], [])


def without_locks(monkeypatch):
    monkeypatch.setattr("segalign.launch.running.run_lock.take_lock", lambda *a, **k: None)


def test_without_locks_one_of_two_makes_an_attempt(run_dir, monkeypatch):
    prepare(run_dir, steps=1)
    without_locks(monkeypatch)
    claim_attempt(run_dir, Claim(attempt=1, host="elsewhere"))
    # Both have looked before either has claimed it.
    monkeypatch.setattr("segalign.launch.running.execute.newest_claim", lambda run_dir: None)
    with pytest.raises(RunHeldError):
        execute(run_dir)
    assert (events(run_dir), read_state(run_dir)) == ([], None)


@pytest.mark.parametrize("has_locks", [True, False])
def test_who_claims_an_attempt_and_dies_blocks_nobody(run_dir, monkeypatch, has_locks):
    prepare(run_dir, steps=1)
    if not has_locks:
        without_locks(monkeypatch)
        start_heartbeat(run_dir, 0.1)
    claim_attempt(run_dir, Claim(attempt=1, host=os.uname().nodename))
    assert execute(run_dir, attempt=1) == 0  # as a controller asks, which sees states alone
    assert read_state(run_dir).attempt == 2


def test_who_claims_an_attempt_and_lives_keeps_it(run_dir, monkeypatch):
    prepare(run_dir, steps=1)
    without_locks(monkeypatch)
    start_heartbeat(run_dir, 0.5)
    (sweep_folder(run_dir) / "attempt-1.claim").touch()  # not written yet
    file = sweep_folder(run_dir) / "heartbeat"
    beating = ["bash", "-c", f"for i in 1 2 3 4; do sleep 0.3; touch {file}; done"]
    with psutil.Popen(beating), pytest.raises(RunHeldError):
        execute(run_dir)
    assert events(run_dir) == []


def test_without_locks_the_heartbeat_tells(run_dir, monkeypatch):
    prepare(run_dir, steps=1)
    write_state(run_dir, RunState(status=RunStatus.RUNNING, host=os.uname().nodename))
    start_heartbeat(run_dir, 0.1)
    without_locks(monkeypatch)
    assert execute(run_dir) == 0


def test_a_full_disk_is_one_line_and_starts_nothing(run_dir):
    prepare(run_dir, steps=1)
    supervisor = start("sweep", "execute", run_dir, log=subprocess.PIPE)
    # No file can grow any more: what a full disk is to a program.
    resource.prlimit(supervisor.pid, resource.RLIMIT_FSIZE, (0, 0))
    output = supervisor.communicate()[0].decode()
    assert (supervisor.returncode, output.count("\n")) == (75, 1), output
    assert output.startswith("error: expected to be able to write")
    assert events(run_dir) == []


def full_after_the_first(written=None):
    """Make a `write_state` that works once; what it was given is kept."""
    written = [] if written is None else written

    def write_once(run_dir, state):
        written.append(state.status)
        if len(written) > 1:
            raise StorageError("expected to be able to write; got: No space left on device.")
        write_state(run_dir, state)

    return write_once


def test_a_disk_that_fills_up_later_fails_the_run(run_dir, monkeypatch):
    prepare(run_dir, ("fit", "test"), steps=1)
    written = []
    monkeypatch.setattr(
        "segalign.launch.running.attempt.write_state", full_after_the_first(written)
    )
    with pytest.raises(OSError, match="No space left"):
        execute(run_dir)
    assert written == [RunStatus.RUNNING, RunStatus.RUNNING, RunStatus.FAILED]
    monkeypatch.undo()
    assert execute(run_dir) == 0


def test_a_full_disk_does_not_hide_why_a_run_failed(run_dir, monkeypatch):
    prepare(run_dir, steps=1)
    monkeypatch.setattr("segalign.launch.running.attempt.write_state", full_after_the_first())
    with pytest.raises(ConfigError, match="no-such-launcher"):
        execute(run_dir, launcher=["no-such-launcher"])


def test_a_finished_run_is_not_touched(run_dir):
    prepare(run_dir)
    state = RunState(status=RunStatus.DONE, stages_done=("fit",))
    for finished in (state, replace(state, status=RunStatus.PRUNED)):
        write_state(run_dir, finished)
        assert execute(run_dir) == 0
        assert read_state(run_dir) == finished
    assert events(run_dir) == []
    assert not (sweep_folder(run_dir) / "lock").exists()
