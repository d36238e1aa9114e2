"""The batch script of a study: one array job, whose text a user can read, change and submit."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from segalign.launch.study import SlurmSettings, Study

# Under these names Lightning takes a job for a shell that somebody works in, and starts the
# processes by itself.
_SHELL_NAMES: Final = ("bash", "interactive")

_MASTER_ADDRESS: Final = """\
# Where the processes of a run meet: the first node. The shell that submitted this job decides
# nothing; the study's `slurm.setup`, which follows, may.
unset MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR"""

# With exec, the signals and the exit code of the job are those of the supervisor itself.
_SUPERVISOR: Final = "# Supervises the runs of this task; srun starts their processes."


def sbatch_text(
    study: Study,
    *,
    num_tasks: int,
    runs_file: Path,
    program: Sequence[str],
    options: Sequence[str],
) -> str:
    """Write the script of an array job.

    Args:
        study: The study; without a ``slurm`` block its defaults hold.
        num_tasks: Tasks of the array, at least 1.
        runs_file: File with a run directory on each line; the job's output goes beside it.
        program: Command line of ``main.py``.
        options: Arguments that every run gets, besides those that follow from the ``slurm`` block.
    """
    slurm = study.slurm or SlurmSettings()
    runs_file = runs_file.absolute()
    request = "\n".join(
        f"#SBATCH {shlex.quote(option)}"
        for option in _request(study.name, slurm, num_tasks, runs_file)
    )
    supervisor = " \\\n  ".join(_supervisor(slurm, runs_file, program, options))
    blocks = [f"#!/bin/bash\n{request}", _MASTER_ADDRESS, *slurm.setup]
    return "\n\n".join([*blocks, f"{_SUPERVISOR}\nexec {supervisor}"]) + "\n"


def job_name(study_name: str) -> str:
    """Name a study's jobs."""
    return f"study-{study_name}" if study_name in _SHELL_NAMES else study_name


def launcher(slurm: SlurmSettings) -> list[str]:
    """Make the command that starts the processes of one run inside a job."""
    parts = ["srun", f"--nodes={slurm.nodes}", f"--ntasks-per-node={slurm.tasks_per_node}"]
    if slurm.cpus_per_task is not None:
        # srun does not take it from the job, as it does the rest.
        parts.append(f"--cpus-per-task={slurm.cpus_per_task}")
    # A process that has died leaves the others waiting for it, until SLURM ends them.
    return [*parts, "--kill-on-bad-exit=1", "--export=ALL"]


def run_options(slurm: SlurmSettings) -> list[str]:
    """Name the settings of runs that follow from what their job asks for."""
    return [
        f"--preemption.signal={slurm.signal}",
        f"--preemption.max_requeues={slurm.max_requeues}",
        f"--trainer.devices={slurm.tasks_per_node}",
        f"--trainer.num_nodes={slurm.nodes}",
    ]


def _request(name: str, slurm: SlurmSettings, num_tasks: int, runs_file: Path) -> Iterator[str]:
    limit = "" if slurm.max_parallel is None else f"%{slurm.max_parallel}"
    output = str(runs_file.with_suffix("")).replace("%", "%%")
    yield f"--job-name={job_name(name)}"
    yield f"--array=0-{num_tasks - 1}{limit}"
    yield f"--nodes={slurm.nodes}"
    yield f"--ntasks-per-node={slurm.tasks_per_node}"
    if slurm.gpus_per_node:
        yield f"--gpus-per-node={slurm.gpus_per_node}"
    yield from _optional(slurm)
    yield f"--time={slurm.time}"
    # To the supervisor, which hands it on: a signal for steps is lost while there is none.
    yield f"--signal=B:{slurm.signal}@{slurm.signal_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={output}-%a.out"
    yield f"--chdir={Path.cwd()}"
    yield "--export=ALL"
    yield from slurm.options


def _optional(slurm: SlurmSettings) -> Iterator[str]:
    """Name what is left to the cluster where the study says nothing."""
    for key in ("cpus_per_task", "mem", "partition", "account", "qos", "constraint"):
        value = getattr(slurm, key)
        if value is not None:
            yield f"--{key.replace('_', '-')}={value}"


def _supervisor(
    slurm: SlurmSettings, runs_file: Path, program: Sequence[str], options: Sequence[str]
) -> Iterator[str]:
    yield shlex.join([*program, "sweep", "execute"])
    yield shlex.join(["--runs-file", str(runs_file)])
    yield '--task "$SLURM_ARRAY_TASK_ID"'
    yield f"--runs-per-task {slurm.runs_per_task}"
    yield shlex.join(["--launcher", shlex.join(launcher(slurm))])
    yield f"--preempting-signal {slurm.signal}"
    yield f"--max-requeues {slurm.max_requeues}"
    for option in (*run_options(slurm), *options):
        yield shlex.quote(f"--option={option}")
