"""How far runs are, as people read it."""

from dataclasses import replace
from pathlib import Path

import pytest

from segalign.launch.plan import PlannedRun
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_folder import attempt_log, sweep_folder
from segalign.launch.running.run_state import RunState, RunStatus
from segalign.launch.running.status_table import (
    describe_change,
    describe_seconds,
    failure_lines,
    num_failed,
    status_rows,
    summary,
)


def seen(status, directory=Path("runs/0f"), state=None, **settings) -> ObservedRun:
    run = PlannedRun(
        run_id="0f", label="k=[1]", arm="a", levels={}, seed=3, directory=directory
    )  # fmt: skip
    state = None if state is None else RunState(status=RunStatus.RUNNING, **state)
    return ObservedRun(run=run, status=status, state=state, **settings)


def row(observed) -> list[str]:
    return status_rows([observed]).rows[0]


def test_counts_are_one_line():
    statuses = [RunStatus.DONE] * 4 + [RunStatus.FAILED, RunStatus.RUNNING]
    assert summary([seen(status) for status in statuses]) == "4 of 6 done, 1 running, 1 failed"
    assert summary([]) == "0 of 0 done"


@pytest.mark.parametrize("status", RunStatus)
def test_every_status_is_counted_and_shown(status):
    assert str(status) in summary([seen(status)])
    assert row(seen(status))[:4] == ["k=[1]", "3", "0f", status]


def test_a_running_run_shows_its_steps_and_its_beat():
    running = seen(RunStatus.RUNNING, state={}, step=12, max_steps=40, beat_age=3.2)
    assert row(running)[4:] == ["12/40", "3 s ago", ""]
    assert row(seen(RunStatus.DONE, step=40))[4] == "40"


def test_a_slow_run_is_named():
    slow = seen(RunStatus.RUNNING, state={}, step=1, beat_age=3.0, progress_age=725.0)
    assert row(slow)[-1] == "no step for 12 min"
    assert row(seen(RunStatus.RUNNING, state={}, progress_age=60.0))[-1] == ""
    assert row(seen(RunStatus.RUNNING, state={"stages_done": ("fit",)}))[-1] == "testing"


def test_failures_are_told_with_their_log(tmp_path):
    sweep_folder(tmp_path).mkdir()
    reason = "expected a learning rate; got 3 apples, and that over and over again"
    failed = seen(RunStatus.FAILED, tmp_path, {"attempt": 2, "exit_code": 78, "reason": reason})
    assert row(failed)[-1] == "exit 78: expected a learning rate; got 3 ..."
    assert failure_lines([failed]) == [f"k=[1], seed 3 (0f): failed: exit 78: {reason}"]
    log = sweep_folder(tmp_path) / "supervisor.log"
    log.touch()
    assert failure_lines([failed])[0].endswith(f" See `{log}`.")
    log = attempt_log(tmp_path, 2)
    log.touch()
    assert failure_lines([failed])[0].endswith(f" See `{log}`.")
    killed = seen(RunStatus.FAILED, state={"exit_code": -9, "reason": "killed by signal 9"})
    assert row(killed)[-1] == "killed by signal 9"
    assert failure_lines([seen(RunStatus.DONE)]) == []
    assert "went down" in failure_lines([seen(RunStatus.DEAD, state={})])[0]


def test_changes_are_one_line():
    assert describe_change(seen(RunStatus.DONE)) == "k=[1], seed 3 (0f): done"
    assert "goes on" in describe_change(seen(RunStatus.PREEMPTED))


def test_a_stopped_run_says_how_it_goes_on():
    assert row(seen(RunStatus.PREEMPTED))[-1] == "goes on from its checkpoint with `sweep resume`"
    assert failure_lines([seen(RunStatus.PREEMPTED)]) == []
    reason = "SIGUSR1 came; SLURM job 12_3 is not requeued: 20 are allowed; go on with something"
    stopped = seen(RunStatus.PREEMPTED, state={"exit_code": 85, "reason": reason})
    note = "`sweep resume` goes on; not requeued: 20 are allowed"
    assert failure_lines([stopped]) == [f"k=[1], seed 3 (0f): preempted: {note}"]
    assert row(stopped)[-1].startswith("`sweep resume` goes on; not requeued")
    assert failure_lines([seen(RunStatus.QUEUED, state={"reason": reason})]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (725, "12 min"), (7200, "2 h"), (3 * 86400, "3 days")],
)
def test_durations(seconds, text):
    assert describe_seconds(seconds) == text


def test_failures_of_one_reason_are_one_line(tmp_path):
    def failed(run_id, reason):
        directory = tmp_path / run_id
        state = {"exit_code": 78, "reason": reason.format(directory)}
        one = seen(RunStatus.FAILED, directory, state)
        return replace(one, run=replace(one.run, run_id=run_id))

    lost = [failed(f"0{n}", "expected data in `{}`; got none.") for n in range(8)]
    reason = lost[0].state.reason
    lines = failure_lines([*lost[:3], failed("0f", "no disk"), *lost[3:]])
    assert lines == [
        f"k=[1], seed 3 (00): failed: exit 78: {reason[:-1]}; the same for 7 more runs.",
        "k=[1], seed 3 (0f): failed: exit 78: no disk",
    ]
    assert failure_lines(lost[:2])[0].endswith("the same for 1 more run.")
    assert num_failed([*lost, seen(RunStatus.DONE)]) == 8
