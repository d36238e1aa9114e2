"""A job is put back by its own name, at most so often, and nothing that fails raises."""

import os
from pathlib import Path

import pytest

from segalign.launch.slurm import requeue as requeue_module
from segalign.launch.slurm.requeue import requeue, restart_count, slurm_job


@pytest.fixture
def scontrol(tmp_path):
    """Put a program in the place of ``scontrol``; returns the environment of a job, and its log."""

    def write(body: str, **variables: str) -> tuple[dict[str, str], Path]:
        log, program = tmp_path / "asked.txt", tmp_path / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{body}\n')
        program.chmod(0o755)
        path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
        return {"PATH": path, "SLURM_JOB_ID": "17", **variables}, log

    return write


def test_a_job_is_put_back_by_its_name(scontrol):
    variables, log = scontrol("exit 0")
    outcome = requeue(2, variables)
    assert (outcome.job, outcome.requeued, outcome.reason) == ("17", True, "")
    assert str(outcome) == "SLURM job 17 is back in the queue"
    assert log.read_text() == "requeue 17\n"


def test_a_task_of_an_array_is_put_back_and_not_the_array(scontrol):
    # The last task of an array has the array's own number.
    variables, log = scontrol("exit 0", SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="0")
    assert requeue(2, variables).job == "17_0"
    assert log.read_text() == "requeue 17_0\n"


@pytest.mark.parametrize(("count", "is_asked"), [("1", True), ("2", False), ("3", False)])
def test_a_job_is_put_back_only_so_often(scontrol, count, is_asked):
    variables, log = scontrol("exit 0", SLURM_RESTART_COUNT=count)
    outcome = requeue(2, variables)
    assert (outcome.requeued, log.exists()) == (is_asked, is_asked)
    if not is_asked:
        assert str(outcome) == (
            f"SLURM job 17 is not requeued: it has been {count} times, and 2 are allowed"
        )


def test_outside_of_a_job_nobody_is_asked(scontrol):
    variables, log = scontrol("exit 0")
    del variables["SLURM_JOB_ID"]
    outcome = requeue(2, variables)
    assert (outcome.job, outcome.requeued, str(outcome)) == (None, False, "there is no SLURM job")
    assert not log.exists()


def look_as(variables: dict[str, str], body: str) -> Path:
    """Put a program in the place of ``squeue``; returns its log."""
    program = Path(variables["PATH"].split(os.pathsep)[0], "squeue")
    log = program.with_name("looked.txt")
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{body}\n')
    program.chmod(0o755)
    return log


@pytest.mark.parametrize(
    "answer", ["COMPLETING|2026-11-23T12:33:33|4:57", "COMPLETING|2026-11-23T12:33:33|UNLIMITED",
               "CANCELLED|2026-11-23T12:33:33|4:57"],
)  # fmt: skip
def test_a_job_that_is_being_cancelled_stays_away(scontrol, answer):
    variables, log = scontrol("exit 0", SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="3")
    looked = look_as(variables, f"echo '{answer}'")
    assert str(requeue(2, variables)) == "SLURM job 17_3 is not requeued: it was cancelled"
    assert looked.read_text() == "--noheader --jobs=17_3 --format=%T|%e|%L\n"
    assert not log.exists()


@pytest.mark.parametrize(
    "body",
    [
        "echo 'RUNNING|2026-11-23T12:33:33|0:20'",  # about to reach its limit
        "echo 'COMPLETING|2026-11-23T12:33:33|0:00'",  # has reached it
        "echo 'COMPLETING|NONE|4:57'",  # for another job
        "echo 'COMPLETING|2026-11-23T12:33:33|4:57'; exit 1",
        "exit 0",
        "exec sleep 20",
    ],
)
def test_a_job_of_which_no_cancellation_is_known_is_put_back(scontrol, body, monkeypatch):
    monkeypatch.setattr(requeue_module, "_LOOK_TIMEOUT", 0.5)
    variables, log = scontrol("exit 0")
    look_as(variables, body)
    assert requeue(2, variables).requeued
    assert log.exists()


def test_a_refusal_is_told_in_one_line(scontrol):
    variables, _ = scontrol("echo 'Requested operation\nis disabled' >&2; exit 3")
    assert str(requeue(2, variables)) == (
        "SLURM job 17 is not requeued: `scontrol` ended with code 3: Requested operation is "
        "disabled"
    )


def test_a_missing_scontrol_is_told(tmp_path):
    outcome = requeue(2, {"PATH": str(tmp_path), "SLURM_JOB_ID": "17"})
    assert not outcome.requeued
    assert outcome.reason == "`scontrol` is not on the PATH"


def test_one_that_cannot_be_started_or_never_answers_is_told(scontrol, monkeypatch):
    variables, _ = scontrol("exec sleep 20")
    monkeypatch.setattr(requeue_module, "_TIMEOUT", 0.2)
    assert "`scontrol` has not answered for 0 s" in str(requeue(2, variables))
    folder = variables["PATH"].split(os.pathsep)[0]
    Path(folder, "scontrol").write_text("no program")
    assert "`scontrol` cannot be started" in str(requeue(2, {**variables, "PATH": folder}))


def test_job_and_count_are_read_from_this_process_too(monkeypatch):
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    assert slurm_job() == "5"
    assert restart_count({"SLURM_RESTART_COUNT": "4"}) == 4
    assert restart_count({"SLURM_RESTART_COUNT": "many"}) == restart_count({}) == 0
