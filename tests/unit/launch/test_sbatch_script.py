"""The text of a study's batch script, as bash and the user read it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from segalign.launch.slurm.sbatch_script import job_name, launcher, run_options, sbatch_text
from segalign.launch.study import SlurmSettings, Study

FULL = SlurmSettings(
    time="08:00:00",
    nodes=2,
    tasks_per_node=8,
    gpus_per_node=8,
    cpus_per_task=6,
    mem="200G",
    partition="gpu",
    account="lab",
    qos="low",
    constraint="a100&nvlink",
    signal="USR2",
    signal_seconds=240,
    max_parallel=16,
    runs_per_task=2,
    max_requeues=7,
    setup=("module load cuda",),
    options=("--exclude=node7",),
)
PRINT_ARGUMENTS = (
    "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['MASTER_ADDR']]))"
)


def text(
    slurm: SlurmSettings | None, name="reweight", runs_file=Path("/s/jobs/001.runs"), **changes
):
    study = Study(
        name=name,
        file=Path("s.yaml"),
        base=(),
        slurm=slurm,
        folder=Path("f"),
        runs_folder=Path("r"),
    )
    settings = {"num_tasks": 6, "program": ("python", "main.py"), "options": (), **changes}
    return sbatch_text(study, runs_file=runs_file, **settings)


def requests(script: str) -> list[str]:
    return [line[len("#SBATCH ") :] for line in script.splitlines() if line.startswith("#SBATCH")]


def test_a_job_asks_for_what_the_study_says():
    assert requests(text(FULL)) == [
        "--job-name=reweight", "--array=0-5%16", "--nodes=2", "--ntasks-per-node=8",
        "--gpus-per-node=8", "--cpus-per-task=6", "--mem=200G", "--partition=gpu", "--account=lab",
        "--qos=low", "'--constraint=a100&nvlink'", "--time=08:00:00", "--signal=B:USR2@240",
        "--requeue", "--open-mode=append", "--output=/s/jobs/001-%a.out", f"--chdir={Path.cwd()}",
        "--export=ALL", "--exclude=node7",
    ]  # fmt: skip


def test_a_study_without_a_block_asks_for_little():
    found = requests(text(None))
    assert "--array=0-5" in found
    assert "--ntasks-per-node=1" in found
    for absent in ("gpus", "mem", "partition", "cpus"):
        assert f"--{absent}" not in " ".join(found)


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_job_is_never_called_like_a_shell(name):
    assert f"--job-name=study-{name}" in requests(text(None, name=name))
    assert job_name("other") == "other"


def test_the_supervisor_takes_the_place_of_the_batch_shell():
    last = text(FULL, program=("python", "main.py")).split("\n\n")[-1]
    assert "exec python main.py sweep execute" in last


def test_the_request_is_at_the_top_and_setup_comes_before_the_runs():
    lines = text(FULL).splitlines()
    assert lines[0] == "#!/bin/bash"
    commands = [n for n, line in enumerate(lines) if line and not line.startswith("#")]
    assert "module load cuda" in [lines[n] for n in commands[:-1]]
    # sbatch reads nothing after the first command.
    assert max(n for n, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]


def test_processes_are_started_by_srun_and_die_together():
    assert launcher(FULL) == [
        "srun", "--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=6", "--kill-on-bad-exit=1",
        "--export=ALL",
    ]  # fmt: skip
    assert "--cpus-per-task" not in " ".join(launcher(SlurmSettings()))


def test_runs_are_told_what_their_job_has():
    assert run_options(FULL) == [
        "--preemption.signal=USR2", "--preemption.max_requeues=7", "--trainer.devices=8",
        "--trainer.num_nodes=2",
    ]  # fmt: skip


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a script in bash; returns the arguments of its program and MASTER_ADDR."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$3" = "n[3-4]" ] && printf "n3\\nn4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[3-4]")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)

    def run(script: str) -> list:
        done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


def test_bash_hands_on_every_argument_as_it_is(execute):
    path = Path("/a b/it's $HOME/100%/001.runs")
    program = (sys.executable, "-c", PRINT_ARGUMENTS)
    script = text(FULL, runs_file=path, program=program, options=["--allow_import=my toys"])
    arguments, _ = execute(script)
    assert arguments == [
        "sweep", "execute", "--runs-file", str(path), "--task", "4", "--runs-per-task", "2",
        "--launcher", " ".join(launcher(FULL)), "--preempting-signal", "USR2",
        "--max-requeues", "7",
        *(f"--option={option}" for option in run_options(FULL)), "--option=--allow_import=my toys",
    ]  # fmt: skip
    # In the name of its output, % is SLURM's.
    assert any("100%%/001-%a.out" in line for line in requests(script))


def test_ranks_meet_at_the_first_node_or_where_setup_says(execute, monkeypatch):
    # What the submitting shell has is of another run.
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    program = (sys.executable, "-c", PRINT_ARGUMENTS.replace("sys.argv[1:]", "dict(os.environ)"))
    environment, address = execute(text(FULL, program=program))
    assert address == "n3"
    assert "MASTER_PORT" not in environment
    slurm = replace(FULL, setup=("export MASTER_ADDR=$MASTER_ADDR-ib", "export MASTER_PORT=5"))
    environment, address = execute(text(slurm, program=program))
    assert (address, environment["MASTER_PORT"]) == ("n3-ib", "5")
