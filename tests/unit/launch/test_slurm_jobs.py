"""Jobs of a cluster whose commands are stand-ins that fail as real ones do."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segalign.errors import ConfigError, DataError
from segalign.launch.plan import PlannedRun
from segalign.launch.running.cancel_request import is_cancel_requested, request_cancel
from segalign.launch.running.run_folder import sweep_folder
from segalign.launch.running.run_state import RunState, RunStatus, read_state, write_state
from segalign.launch.slurm.slurm_commands import ClusterError
from segalign.launch.slurm.slurm_jobs import cancel_jobs, queued_runs, submit
from segalign.launch.slurm.slurm_records import (
    jobs_lock,
    load_records,
    next_record_file,
    script_file,
)
from segalign.launch.study import SlurmSettings, Study

SILENT = "exit 0"
FAILS = 'echo "squeue: error: no controller" >&2; exit 1'


@pytest.fixture
def study(tmp_path) -> Study:
    folder = tmp_path / "study"
    return Study(name="toy", file=Path("s"), base=(), folder=folder, runs_folder=tmp_path / "runs")


@pytest.fixture
def runs(study) -> list[PlannedRun]:
    runs = []
    for seed in range(2):
        directory = study.runs_folder / str(seed)
        sweep_folder(directory).mkdir(parents=True)
        runs.append(
            PlannedRun(
                run_id=str(seed), label="", arm="", levels={}, seed=seed, directory=directory
            )
        )
    return runs


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Put stand-ins on the PATH; each call of one is a line of a log."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(**scripts: str):
        for name, script in scripts.items():
            text = f'#!/bin/bash\necho {name} "$@" >>"{log}"\n{script}\n'
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    install(sbatch="echo 7", squeue=SILENT, scontrol="echo MaxArraySize = 1001", scancel=SILENT)
    install.calls = lambda: log.read_text().splitlines() if log.exists() else []
    return install


def in_queue(study: Study, job_id: int = 7, *tasks: int, number: int = 1) -> str:
    """Answer as squeue does of jobs whose script is the study's."""
    script = study.folder / f"jobs/{number:03d}.sbatch"
    return "\n".join(f"echo '{job_id}|{task}|{script}'" for task in tasks or (0, 1))


def test_a_machine_without_slurm_is_told_of_local_runs(study, runs, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"`sbatch`.*`--local N`"):
        submit(study, runs, ("p",), ())
    assert not study.folder.exists()


def test_the_files_of_a_job_say_what_it_does(study, runs, commands):
    job = submit(study, runs, ("p",), ())
    assert (job.job_id, job.script) == ("7", study.folder / "jobs/001.sbatch")
    lines = [str(run.directory) for run in runs]
    assert (study.folder / "jobs/001.runs").read_text().splitlines() == lines
    record = json.loads((study.folder / "jobs/001.json").read_text())
    assert (record["job_id"], record["runs"], record["runs_per_task"]) == ("7", lines, 1)
    assert f"sbatch --parsable {job.script}" in commands.calls()


def test_the_number_of_a_job_is_read_beside_remarks_of_the_site(study, runs, commands):
    commands(sbatch="echo 'welcome to the cluster'; echo '31;big'")
    assert submit(study, runs, ("p",), ()).job_id == "31"


def test_a_study_without_jobs_asks_no_cluster(study, commands):
    assert queued_runs(study.folder) == {}
    assert len(cancel_jobs(study.folder)) == 0
    assert commands.calls() == []


def test_output_without_a_number_is_no_number(study, runs, commands):
    commands(sbatch="echo '12 jobs of yours wait'; echo 33; echo 'budget left: 4'")
    assert submit(study, runs, ("p",), ()).job_id == "33"


@pytest.mark.parametrize("printed", ["exit 0", "echo 'job accepted'; echo"])
def test_a_job_whose_number_sbatch_keeps_to_itself_is_found_in_the_queue(
    study, runs, commands, printed
):
    commands(sbatch=printed, squeue=in_queue(study, 7))
    assert submit(study, runs, ("p",), ()).job_id == "7"


def test_a_job_without_a_number_that_no_queue_has_is_looked_for_later(study, runs, commands):
    commands(sbatch="exit 0")
    with pytest.raises(ClusterError, match="no number"):
        submit(study, runs, ("p",), ())
    commands(squeue=in_queue(study, 7))
    assert submit(study, runs, ("p",), ()).runs == ()


@pytest.mark.parametrize(
    "said",
    [
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Socket timed out on send/recv operation",
        "",
    ],
)
def test_a_submission_that_may_have_arrived_keeps_its_record(study, runs, commands, said):
    commands(sbatch=f"echo '{said}' >&2; exit 1")
    with pytest.raises(ClusterError, match="found then"):
        submit(study, runs, ("p",), ())
    assert [record.job_id for record in load_records(study.folder).values()] == [None]
    commands(squeue=in_queue(study, 7))
    assert set(queued_runs(study.folder).values()) == {"7_0", "7_1"}


def test_a_job_of_another_with_the_same_number_is_left_alone(study, runs, commands):
    submit(study, runs, ("p",), ())
    foreign = "echo '7|0|/other/001.sbatch'; echo '7|1|(null)'; echo '7|N/A|x'"
    commands(squeue=foreign, sbatch="echo 8")
    assert queued_runs(study.folder) == {}
    assert len(cancel_jobs(study.folder)) == 0
    assert not any(call.startswith("scancel") for call in commands.calls())
    assert submit(study, runs, ("p",), ()).job_id == "8"


def test_a_folder_that_is_named_by_a_link_has_the_same_jobs(study, runs, commands, tmp_path):
    submit(study, runs, ("p",), ())
    commands(squeue=in_queue(study))
    (tmp_path / "link").symlink_to(study.folder)
    assert set(queued_runs(tmp_path / "link").values()) == {"7_0", "7_1"}


def test_settings_in_the_environment_change_no_command(
    study, runs, commands, tmp_path, monkeypatch
):
    for name in ("SQUEUE_STATES", "SCANCEL_STATE", "SBATCH_TIMELIMIT", "SRUN_DEBUG",
                 "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_CONF", "OTHER"):  # fmt: skip
        monkeypatch.setenv(name, "1")
    show = f"env >>'{tmp_path}/seen-$(basename $0)'".replace("'", '"')
    commands(sbatch=f"{show}; echo 7", squeue=f"{show}; {in_queue(study).replace(chr(10), ';')}")
    submit(study, runs, ("p",), ())
    queued_runs(study.folder)
    for command in ("sbatch", "squeue"):
        lines = (tmp_path / f"seen-{command}").read_text().splitlines()
        names = {line.partition("=")[0] for line in lines}
        foreign = ("SLURM_", "SQUEUE_", "SCANCEL_", "SBATCH_", "SRUN_")
        assert {one for one in names if one.startswith(foreign)} == {"SLURM_CONF"}
        assert "OTHER" in names


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_disk_without_locks_takes_jobs(study, runs, commands, monkeypatch, caplog, number):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert submit(study, runs, ("p",), ()).job_id == "7"
    assert "without locks" in caplog.text


def test_a_finished_study_asks_no_cluster(study, runs, commands):
    submit(study, runs, ("p",), ())
    before = len(commands.calls())
    for run, status in zip(runs, (RunStatus.DONE, RunStatus.PRUNED), strict=True):
        write_state(run.directory, RunState(status=status))
    commands(squeue=FAILS)
    assert queued_runs(study.folder) == {}
    assert len(commands.calls()) == before


@pytest.mark.parametrize("script", [FAILS, "exit 1", "kill -9 $$"])
def test_a_queue_that_cannot_be_read_is_not_an_empty_one(study, runs, commands, script):
    submit(study, runs, ("p",), ())
    commands(squeue=script)
    with pytest.raises(ClusterError, match="unknown"):
        queued_runs(study.folder)
    with pytest.raises(ClusterError, match="unknown"):
        submit(study, runs, ("p",), ())
    assert len(load_records(study.folder)) == 1


def test_a_missing_squeue_is_not_an_empty_queue(study, runs, commands, monkeypatch, tmp_path):
    submit(study, runs, ("p",), ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="`squeue`"):
        queued_runs(study.folder)


def test_an_answer_of_sbatch_that_is_lost_makes_no_second_job(study, runs, commands):
    commands(sbatch="echo 'sbatch: error: Socket timed out' >&2; exit 1", squeue=in_queue(study))
    assert submit(study, runs, ("p",), ()).job_id == "7"
    assert submit(study, runs, ("p",), ()).runs == ()


def test_a_submission_of_which_nothing_is_known_is_looked_for_later(study, runs, commands):
    commands(sbatch="exit 1", squeue=FAILS)
    with pytest.raises(ClusterError):
        submit(study, runs, ("p",), ())
    commands(sbatch="echo 8", squeue=in_queue(study, 7))
    assert set(queued_runs(study.folder).values()) == {"7_0", "7_1"}
    assert submit(study, runs, ("p",), ()).job_id == "7_0, 7_1"
    assert [record.job_id for record in load_records(study.folder).values()] == ["7"]


def test_only_what_no_job_has_is_submitted(study, runs, commands):
    submit(study, runs, ("p",), ())
    commands(squeue=in_queue(study, 7, 1), sbatch="echo 8")
    job = submit(study, runs, ("p",), ())
    assert (job.job_id, job.runs) == ("8", (runs[0].directory,))


def test_a_submission_withdraws_what_cancelled_its_runs(study, runs, commands):
    request_cancel(runs[0].directory)
    submit(study, runs, ("p",), ())
    assert not is_cancel_requested(runs[0].directory)


def test_a_refused_job_leaves_no_record(study, runs, commands):
    refusal = "sbatch: error: invalid qos\nsbatch: error: Batch job submission failed: Invalid qos"
    commands(sbatch=f"echo '{refusal}' >&2; exit 1")
    with pytest.raises(ConfigError, match="invalid qos; Batch job submission failed: Invalid qos"):
        submit(study, runs, ("p",), ())
    assert load_records(study.folder) == {}


def test_a_cluster_that_does_not_tell_its_limit_decides_itself(study, runs, commands):
    commands(scontrol="exit 1")
    assert submit(study, runs, ("p",), ()).job_id == "7"


def test_runs_share_tasks_where_the_limit_wants_it(study, runs, commands):
    commands(scontrol="echo 'MaxArraySize            = 1'")
    with pytest.raises(ConfigError, match=r"at most 1 tasks.*`slurm.runs_per_task: 2`"):
        submit(study, runs, ("p",), ())
    shared = Study(**{**vars(study), "slurm": SlurmSettings(runs_per_task=2)})
    submit(shared, runs, ("p",), ())
    commands(squeue=in_queue(study, 7, 0))
    assert queued_runs(study.folder) == {run.directory: "7_0" for run in runs}


def test_a_damaged_record_is_named(study, runs, commands):
    submit(study, runs, ("p",), ())
    (study.folder / "jobs/001.json").write_text("{")
    with pytest.raises(DataError, match=r"001\.json"):
        queued_runs(study.folder)


def test_cancelling_goes_on_until_the_queue_is_empty(study, runs, commands, tmp_path):
    submit(study, runs, ("p",), ())
    # A job that was put back after the first time.
    left = tmp_path / "left"
    left.write_text("xxx")
    commands(
        squeue=f"[ -s '{left}' ] && {{ {in_queue(study)}\n}}; exit 0",
        scancel=f"truncate --size=-1 '{left}'",
    )
    write_state(runs[0].directory, RunState(status=RunStatus.DONE))
    assert len(cancel_jobs(study.folder)) == 1
    assert left.read_text() == ""
    assert commands.calls().count("scancel 7") == 3
    assert is_cancel_requested(runs[1].directory)


@pytest.mark.parametrize("status", [RunStatus.FAILED, RunStatus.DONE, RunStatus.PRUNED])
def test_cancelling_leaves_what_has_ended_as_it_is(study, runs, commands, tmp_path, status):
    submit(study, runs, ("p",), ())
    ended = RunState(status=status, reason="of its own", exit_code=9)
    write_state(runs[0].directory, ended)
    write_state(runs[1].directory, RunState(status=RunStatus.PREEMPTED))
    gone = tmp_path / "gone"
    commands(squeue=f"[ -e '{gone}' ] || {{ {in_queue(study)}\n}}", scancel=f"touch '{gone}'")
    assert len(cancel_jobs(study.folder)) == 1
    assert read_state(runs[0].directory) == ended
    assert not is_cancel_requested(runs[0].directory)
    assert read_state(runs[1].directory).status == RunStatus.CANCELLED
    assert is_cancel_requested(runs[1].directory)


def test_a_run_that_fails_because_it_is_ended_is_cancelled(study, runs, commands, tmp_path):
    submit(study, runs[:1], ("p",), ())
    write_state(runs[0].directory, RunState(status=RunStatus.FAILED, reason="killed by signal 15"))
    state = sweep_folder(runs[0].directory) / "state.json"
    failed, gone = tmp_path / "failed", tmp_path / "gone"
    failed.write_bytes(state.read_bytes())
    write_state(runs[0].directory, RunState(status=RunStatus.RUNNING))
    commands(
        squeue=f"[ -e '{gone}' ] || {{ {in_queue(study, 7, 0)}\n}}",
        scancel=f"cp '{failed}' '{state}'; touch '{gone}'",
    )
    assert len(cancel_jobs(study.folder)) == 1
    assert read_state(runs[0].directory).status == RunStatus.CANCELLED


SUBMIT = """
import sys
from pathlib import Path
from segalign.launch.plan import PlannedRun
from segalign.launch.slurm.slurm_jobs import submit
from segalign.launch.study import Study
root = Path(sys.argv[1])
run = PlannedRun(
    run_id="0", label="", arm="", levels={}, seed=0, directory=root / "runs/0"
)
study = Study(name="toy", file=root, base=(), folder=root / "study", runs_folder=root / "runs")
submit(study, [run], ("p",), ())
"""


def test_a_kill_while_sbatch_works_makes_no_second_job(study, runs, commands, tmp_path, repository):
    # The job gets into the queue only after the death of who asked for it.
    begun, go_on, queue = (tmp_path / name for name in ("begun", "go_on", "queue"))
    slow = f"touch '{begun}'; until [ -e '{go_on}' ]; do sleep 0.02; done; touch '{queue}'; echo 7"
    commands(sbatch=slow, squeue=f"[ -e '{queue}' ] && {{ {in_queue(study, 7, 0)}\n}}; exit 0")
    line = [sys.executable, "-c", SUBMIT, str(tmp_path)]
    process = subprocess.Popen(line, cwd=repository, env={**os.environ, "PYTHONPATH": "."})
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    second = subprocess.Popen(line, cwd=repository, env={**os.environ, "PYTHONPATH": "."})
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)  # for sbatch, which holds the lock
    go_on.touch()
    assert second.wait(20) == 0
    assert [record.job_id for record in load_records(study.folder).values()] == ["7"]
    assert sum(call.startswith("sbatch") for call in commands.calls()) == 1


def test_names_of_jobs_go_on_from_the_last(study, runs, commands):
    submit(study, runs, ("p",), ())
    second = next_record_file(study.folder)
    assert second.name == "002.json"
    assert script_file(second) == study.folder / "jobs/002.sbatch"
    with jobs_lock(study.folder):
        pass
