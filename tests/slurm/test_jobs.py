"""Array jobs on a real cluster, with runs that cost nothing."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from segalign.errors import ConfigError
from segalign.launch.plan import PlannedRun
from segalign.launch.running.run_folder import config_file, sweep_folder
from segalign.launch.running.run_state import RunState, RunStatus, read_state, write_state
from segalign.launch.slurm import slurm_jobs
from segalign.launch.slurm.slurm_commands import ClusterError
from segalign.launch.slurm.slurm_jobs import cancel_jobs, queued_runs, submit
from segalign.launch.slurm.slurm_records import load_records
from segalign.launch.study import SlurmSettings, Study

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("_on_cluster")]

SECONDS_OF_A_LONG_RUN = 120


@pytest.fixture
def study(tmp_path) -> Study:
    # A user's folders may have any name.
    root = tmp_path / "my 'own' 100% study"
    settings = SlurmSettings(time="5", signal_seconds=30)
    return Study(
        name="toy",
        file=root / "toy.yaml",
        base=(),
        slurm=settings,
        folder=root / "toy",
        runs_folder=root / "runs",
    )


@pytest.fixture
def program(repository) -> tuple[str, str]:
    return sys.executable, str(repository / "tests/toys/toy_job.py")


def with_slurm(study: Study, **settings) -> Study:
    return replace(study, slurm=replace(study.slurm, **settings))


def make_runs(study: Study, *lives: tuple[float, int]) -> list[PlannedRun]:
    """Prepare runs that take so many seconds and end with this code."""
    runs = []
    for seed, (seconds, code) in enumerate(lives):
        run_id = f"{seed:012x}"
        directory = study.runs_folder / run_id
        sweep_folder(directory).mkdir(parents=True)
        spec = {"run_id": run_id, "study": "toy", "label": "base", "stages": ["fit"]}
        (sweep_folder(directory) / "spec.json").write_text(json.dumps({**spec, "max_steps": 1}))
        settings = {"run_dir": str(directory), "seconds": seconds, "code": code}
        config_file(directory, "fit").write_text(json.dumps(settings))
        runs.append(
            PlannedRun(
                run_id=run_id, label="base", arm="base", levels={}, seed=seed, directory=directory
            )
        )
    return runs


def lives(run: PlannedRun, process: int = 0) -> list[list[str]]:
    file = run.directory / f"lives-{process}"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def statuses(runs: list[PlannedRun]) -> list[str]:
    states = [read_state(run.directory) for run in runs]
    return ["" if state is None else state.status for state in states]


def output(study: Study) -> str:
    return "".join(path.read_text() for path in sorted((study.folder / "jobs").glob("*.out")))


def squeue(*options: str) -> str:
    command = ["squeue", "--noheader", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_array_makes_every_run(study, program, wait):
    study = with_slurm(study, runs_per_task=2, max_parallel=2, nodes=2)
    # Of the run that fails, one process would wait for long for the other.
    runs = make_runs(study, (0, 0), (0, 0), (SECONDS_OF_A_LONG_RUN, 9), (0, 0), (0, 0))
    write_state(runs[0].directory, RunState(status=RunStatus.DONE))
    job = submit(study, runs, program, ["--allow_import=toy"])
    assert squeue("--format=%j", "--jobs", job.job_id).split()[0] == "toy"
    queued = queued_runs(study.folder)
    assert queued == {run.directory: f"{job.job_id}_{n // 2}" for n, run in enumerate(runs)}
    wait(lambda: not queued_runs(study.folder))
    assert statuses(runs) == ["done", "done", "failed", "done", "done"], output(study)
    assert [len(lives(run, 1)) for run in runs] == [0, 1, 1, 1, 1]
    assert read_state(runs[2].directory).reason == "told to end with 9"
    assert read_state(runs[2].directory).seconds < SECONDS_OF_A_LONG_RUN
    assert read_state(runs[3].directory).job == f"{job.job_id}_1"
    arguments = lives(runs[1], 1)[0]
    assert arguments[3:] == [
        "--preemption.signal=USR1", "--preemption.max_requeues=20", "--trainer.devices=1",
        "--trainer.num_nodes=2", "--allow_import=toy",
    ]  # fmt: skip


def test_runs_in_the_queue_are_not_submitted_again_and_can_be_cancelled(
    study, program, wait, job_processes
):
    # Two nodes: two runs run, the last waits.
    runs = make_runs(study, *[(SECONDS_OF_A_LONG_RUN, 0)] * 3)
    first = submit(study, runs[:2], program, [])
    second = submit(study, runs, program, [])
    assert second.runs == (runs[2].directory,)
    third = submit(study, runs, program, [])
    assert third.runs == ()
    assert third.job_id == f"{first.job_id}_0, {first.job_id}_1, {second.job_id}_0"
    wait(lambda: lives(runs[0]) and lives(runs[1]))
    assert len(job_processes()) >= 4
    assert len(cancel_jobs(study.folder)) == 3
    assert queued_runs(study.folder) == {}
    assert job_processes() == []
    assert statuses(runs) == ["cancelled"] * 3
    assert read_state(runs[2].directory).attempt == 0
    assert [len(lives(run)) for run in runs] == [1, 1, 0]
    assert len(cancel_jobs(study.folder)) == 0
    # What has lived before takes no time.
    submit(study, runs[:2], program, [])
    wait(lambda: not queued_runs(study.folder))
    assert statuses(runs) == ["done", "done", "cancelled"], output(study)


def test_a_preempted_task_goes_on_where_it_was(study, program, wait, send_signal):
    # The signal ends a process that does not answer it yet.
    study = with_slurm(study, runs_per_task=2)
    runs = make_runs(study, (0, 0), (SECONDS_OF_A_LONG_RUN, 0))
    job = submit(study, runs, program, [])
    wait(lambda: lives(runs[1]))
    send_signal(f"{job.job_id}_0")
    wait(lambda: len(lives(runs[1])) == 2)
    wait(lambda: not queued_runs(study.folder))
    assert statuses(runs) == ["done", "done"], output(study)
    assert [len(lives(run)) for run in runs] == [1, 2]
    assert read_state(runs[1].directory).attempt == 2


def test_a_job_that_the_cluster_takes_back_is_no_failure(study, program, wait):
    [run] = make_runs(study, (SECONDS_OF_A_LONG_RUN, 0))
    job = submit(study, [run], program, [])
    wait(lambda: lives(run))
    subprocess.run(["scontrol", "requeue", job.job_id], check=True)
    wait(lambda: statuses([run]) == ["preempted"])
    assert queued_runs(study.folder) == {run.directory: f"{job.job_id}_0"}
    wait(lambda: not queued_runs(study.folder))
    assert statuses([run]) == ["done"], output(study)


def test_a_run_gives_way_to_a_partition_that_matters_more_and_goes_on(study, program, wait):
    [run] = make_runs(study, (SECONDS_OF_A_LONG_RUN, 0))
    submit(study, [run], program, [])
    wait(lambda: lives(run))
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, capture_output=True, check=True)
    wait(lambda: statuses([run]) == ["preempted"])
    assert list(queued_runs(study.folder)) == [run.directory]
    wait(lambda: not queued_runs(study.folder))
    assert statuses([run]) == ["done"], output(study)
    assert (len(lives(run)), read_state(run.directory).attempt) == (2, 2)


def test_an_array_that_is_too_large_names_the_limit_and_a_value_that_fits(study, program):
    runs = make_runs(study, *[(0, 0)] * 9)
    with pytest.raises(ConfigError, match=r"at most 8 tasks.*got 9.*`slurm.runs_per_task: 2`"):
        submit(study, runs, program, [])
    assert queued_runs(study.folder) == {}
    # As many as the limit are taken.
    held = with_slurm(study, options=["--hold"])
    submit(held, runs[:8], program, [])
    assert len(queued_runs(study.folder)) == 8
    assert len(cancel_jobs(study.folder)) == 8
    held = with_slurm(study, options=["--hold"], runs_per_task=2)
    assert len(submit(held, runs, program, []).runs) == 9
    assert len(cancel_jobs(study.folder)) == 9


def test_what_sbatch_refuses_is_told_in_one_line(study, program):
    runs = make_runs(study, (0, 0))
    with pytest.raises(ConfigError) as caught:
        submit(with_slurm(study, partition="nowhere"), runs, program, [])
    message = str(caught.value)
    assert re.search("invalid partition specified: nowhere", message)
    assert "\n" not in message
    assert "sbatch: error" not in message
    assert load_records(study.folder) == {}
    held = with_slurm(study, options=["--hold"])
    assert submit(held, runs, program, []).script.name == "001.sbatch"
    assert len(cancel_jobs(study.folder)) == 1


def test_a_job_whose_number_was_never_written_is_found_again(study, program, monkeypatch):
    runs = make_runs(study, (0, 0), (0, 0))
    held = with_slurm(study, options=["--hold"])
    with monkeypatch.context() as patch:
        # As if the process died when sbatch returned.
        patch.setattr(slurm_jobs, "replace", None)
        with pytest.raises(TypeError):
            submit(held, runs, program, [])
    [record] = load_records(study.folder).values()
    assert record.job_id is None
    job = submit(held, runs, program, [])
    assert job.runs == ()
    assert len(squeue("--array").splitlines()) == 2
    [record] = load_records(study.folder).values()
    assert f"{record.job_id}_0, {record.job_id}_1" == job.job_id
    assert len(cancel_jobs(study.folder)) == 2


def test_a_submission_that_died_before_sbatch_is_made_again(study, program, monkeypatch):
    runs = make_runs(study, (0, 0))
    held = with_slurm(study, options=["--hold"])
    with monkeypatch.context() as patch:
        patch.setattr(slurm_jobs, "_call_sbatch", None)
        with pytest.raises(TypeError):
            submit(held, runs, program, [])
    assert queued_runs(study.folder) == {}
    assert submit(held, runs, program, []).runs == (runs[0].directory,)
    assert len(cancel_jobs(study.folder)) == 1


def test_a_job_that_the_cluster_has_forgotten_is_not_in_its_queue(study, program):
    runs = make_runs(study, (0, 0))
    held = with_slurm(study, options=["--hold"])
    submit(held, runs, program, [])
    cancel_jobs(study.folder)
    [(path, record)] = load_records(study.folder).items()
    replace(record, job_id="999999").save(path)
    assert queued_runs(study.folder) == {}


def test_a_cluster_that_does_not_answer_is_not_an_empty_queue(
    study, program, cluster, tmp_path, monkeypatch
):
    runs = make_runs(study, (0, 0))
    held = with_slurm(study, options=["--hold"])
    submit(held, runs, program, [])
    deaf = tmp_path / "slurm.conf"
    # Nothing listens on the port of `discard`.
    deaf.write_text(
        re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9\nMessageTimeout=1", cluster.read_text())
    )
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(deaf))
        for command in (
            lambda: queued_runs(study.folder),
            lambda: cancel_jobs(study.folder),
            lambda: submit(held, runs, program, []),
        ):
            with pytest.raises(ClusterError, match=r"Unable to contact slurm controller.*unknown"):
                command()
    assert len(queued_runs(study.folder)) == 1
    assert len(cancel_jobs(study.folder)) == 1
