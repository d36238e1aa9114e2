"""Studies on a cluster whose commands are stand-ins: what is started, and what can be asked."""

from collections.abc import Callable

import pytest

import main
from segalign.launch.launcher import Launcher
from segalign.launch.looking import cancel, show_status, show_table
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
