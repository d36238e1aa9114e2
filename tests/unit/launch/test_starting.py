"""Studies on a cluster whose commands are stand-ins: what is started, and what can be asked."""

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
from toy_results import write_curves

import main
from segalign.errors import SegalignError
from segalign.launch import looking, starting
from segalign.launch.launcher import Launcher
from segalign.launch.looking import cancel, show_status, show_table
from segalign.launch.plan import Plan
from segalign.launch.running.run_folder import sweep_folder
from segalign.launch.running.run_lock import run_lock
from segalign.launch.running.run_state import RunState, RunStatus, write_state
from segalign.launch.slurm.slurm_commands import ClusterError
from segalign.launch.slurm.slurm_records import load_records
from segalign.launch.starting import show_plan, start_study
from segalign.launch.study import Study
from segalign.launch.study_file import load_study

FAILS = 'echo "squeue: error: no controller" >&2; exit 1'


@pytest.fixture(scope="module")
def resolve():
    return main.resolve_configs(["toy_house"])


@pytest.fixture
def study(toy_config, tmp_path) -> Study:
    file = tmp_path / "toy.yaml"
    folders = f"folder: {tmp_path}/sweep\nruns_folder: {tmp_path}/runs"
    file.write_text(f"base: {toy_config}\n{folders}\nslurm: {{}}\nmetrics: [train/loss]\n")
    return load_study(file)


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Callable[..., None]:
    """Put stand-ins of SLURM's commands on the PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def install(**scripts: str) -> None:
        for name, script in scripts.items():
            file = tmp_path / "bin" / name
            file.write_text(f"#!/bin/bash\n{script}\n")
            file.chmod(0o755)

    install(sbatch="echo 7", squeue="exit 0", scontrol="exit 1", scancel="exit 0")
    return install


@pytest.fixture
def start(study, resolve, commands) -> Callable[[], int]:
    launcher = Launcher(backend="slurm")
    return lambda: start_study("run", study, launcher, lambda _: resolve, ("p",))


def test_a_cluster_that_does_not_answer_hides_no_results(study, start, commands, capsys):
    start()
    commands(squeue=FAILS)
    for show in (show_status, lambda one: show_table(one, "markdown")):
        capsys.readouterr()
        show(study)
        lines = capsys.readouterr().out.splitlines()
        notes = [line for line in lines if line.startswith("note: ")]
        assert len(notes) == 1
        assert "no controller" in notes[0]
        assert len(lines) > 2
    for change in (cancel, lambda _: start()):
        with pytest.raises(ClusterError):
            change(study)


def test_runs_that_another_command_has_submitted_are_nothing_to_start(
    study, start, commands, capsys, tmp_path
):
    start()
    assert "1 runs are put into the queue as job 7" in capsys.readouterr().out
    # The first answer is older than the job.
    asked = tmp_path / "asked"
    row = f"echo '7|0|{study.folder}/jobs/001.sbatch'"
    commands(squeue=f"if [ -e '{asked}' ]; then {row}; else touch '{asked}'; fi")
    start()
    assert "nothing to start" in capsys.readouterr().out
    assert len(load_records(study.folder)) == 1


def test_a_plan_shows_the_job_that_comes_next(study, resolve, start, capsys):
    show_plan(study, resolve, ("p",))
    assert f"--runs-file {study.folder}/jobs/001.runs" in capsys.readouterr().out
    start()
    capsys.readouterr()
    show_plan(study, resolve, ("p",))
    assert f"--runs-file {study.folder}/jobs/002.runs" in capsys.readouterr().out


def test_a_plan_without_a_cluster_says_why_it_shows_no_job(study, resolve, capsys):
    show_plan(replace(study, slurm=None), resolve, ("p",))
    assert "no job is shown, because the study has no `slurm` block: add" in capsys.readouterr().out


@pytest.fixture
def two_runs(study, resolve, commands, monkeypatch):
    """Start a study of two runs on this machine, with a stand-in that runs nothing."""
    monkeypatch.setattr(starting, "run_local", lambda runs, program, **options: None)
    two = replace(study, slurm=None, seeds=(0, 1))

    def start(command="run"):
        start_study(command, two, Launcher(backend="local"), lambda _: resolve, ("p",))
        return [run.directory for run in Plan.load(two.folder).runs]

    return start


def test_runs_that_are_started_are_told_from_those_of_another_command(two_runs, capsys):
    first, second = two_runs()
    assert "starting 2 runs, 1 at a time\n" in capsys.readouterr().out
    with run_lock(first):
        two_runs()
        told = "starting 1 run, 1 at a time; waiting for 1 run that another command has started"
        assert told in capsys.readouterr().out.replace("\n", " ")
        with run_lock(second):
            two_runs()
    told = capsys.readouterr().out
    assert "waiting for 2 runs that another command has started" in told
    assert "starting" not in told


def test_a_metric_that_no_run_has_is_told_at_the_end(two_runs, capsys):
    runs = two_runs()
    assert "note: " not in capsys.readouterr().out
    for run in runs:
        write_state(run, RunState(status=RunStatus.DONE))
        write_curves(run, {"train/lost": {0: 1.0}})
    two_runs()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("note: ")]) == 1
    assert "no finished run has `train/loss`: near it are `train/lost`" in "".join(lines)


def test_a_directory_of_another_config_keeps_no_other_run_from_starting(two_runs, capsys):
    first, second = two_runs()
    shutil.rmtree(second)
    spec = sweep_folder(first) / "spec.json"
    spec.write_text(spec.read_text().replace(first.name, "0123456789ab"))
    capsys.readouterr()
    with pytest.raises(SegalignError, match=r"1 of 2 failed: .*is that of config 0123456789ab"):
        two_runs()
    told = capsys.readouterr().out
    assert "seed 0 is left out: expected" in told
    assert "starting 1 run" in told
    assert (sweep_folder(second) / "spec.json").exists()


def test_a_run_that_is_ended_here_and_on_the_cluster_counts_once(
    study, start, capsys, monkeypatch, tmp_path
):
    start()
    both, other = tmp_path / "both", tmp_path / "other"
    monkeypatch.setattr(looking, "cancel_jobs", lambda folder: [both])
    monkeypatch.setattr(looking, "cancel_local", lambda runs: [both, other])
    cancel(study)
    assert "stopped 1 runs on this machine and 1 on the cluster" in capsys.readouterr().out


def test_cancel_names_the_studies_that_wait_for_the_same_runs(study, start, resolve, capsys):
    start()
    twin = replace(study, name="twin", folder=study.folder.with_name("twin"))
    start_study("run", twin, Launcher(backend="slurm"), lambda _: resolve, ("p",))
    other = replace(study, name="other", seeds=(5,), folder=study.folder.with_name("other"))
    start_study("run", other, Launcher(backend="slurm"), lambda _: resolve, ("p",))
    (study.folder.with_name("broken")).mkdir()
    (study.folder.with_name("broken") / "plan.json").write_text("{")
    capsys.readouterr()
    cancel(study)
    note = "note: other studies wait for 1 of the cancelled runs too: `twin` (1)"
    assert note in capsys.readouterr().out
    capsys.readouterr()
    cancel(other)
    assert "other studies" not in capsys.readouterr().out
