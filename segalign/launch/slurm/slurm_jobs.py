"""The jobs of a study on a SLURM cluster: submit them, find them in its queue, cancel them.

Only `sbatch`, `squeue`, `scancel` and `scontrol` are asked, so that it works without accounting.
"""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from segalign.atomic import make_directory, write_text_atomic
from segalign.errors import ConfigError
from segalign.launch.plan import PlannedRun
from segalign.launch.running.cancel_request import request_cancel, withdraw_cancel
from segalign.launch.running.run_folder import sweep_folder
from segalign.launch.running.run_state import FINISHED, RunState, RunStatus, read_state, write_state
from segalign.launch.slurm.sbatch_script import sbatch_text
from segalign.launch.slurm.slurm_commands import (
    ClusterError,
    CommandFailedError,
    call,
    max_array_size,
    require_sbatch,
    unanswered,
)
from segalign.launch.slurm.slurm_queue import ask, find_job, live_tasks
from segalign.launch.slurm.slurm_records import (
    JobRecord,
    jobs_lock,
    load_records,
    next_record_file,
    script_file,
)
from segalign.launch.study import SlurmSettings, Study

# What `sbatch --parsable` prints of a job, beside a site's remarks.
_NUMBER: Final = re.compile(r"^(\d+)(?:;\S*)?$", re.MULTILINE)
# A failure of `sbatch` that leaves open whether the job was taken.
_UNCERTAIN: Final = re.compile(
    r"timed out|unable to contact|communication|connection|zero bytes|not responding|no message",
    re.IGNORECASE,
)
# Runs that keep their state when what is left of their job is ended.
_ENDED: Final = (*FINISHED, RunStatus.FAILED)
_CANCEL_SECONDS = 180.0
_CANCEL_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """What `submit` did.

    Attributes:
        job_id: SLURM's number of the array job; if all runs were in the queue already, the
            numbers of the jobs that have them.
        runs: Absolute run directories of the new job; empty if there is none.
        script: Its script.
    """

    job_id: str
    runs: tuple[Path, ...]
    script: Path


def submit(
    study: Study, runs: Sequence[PlannedRun], program: Sequence[str], options: Sequence[str]
) -> SubmittedJob:
    """Submit one array job with all runs that no job in the queue has.

    Args:
        study: The study.
        runs: Prepared runs, at least one, each once.
        program: Command line of ``main.py``.
        options: Arguments that every run gets.

    Raises:
        ConfigError: If there is no SLURM, the array would be too large, or SLURM refuses the job.
        ClusterError: If the cluster does not answer.
        StorageError: If the job's files cannot be written.
    """
    require_sbatch()
    with jobs_lock(study.folder) as lock:
        queued = queued_runs(study.folder)
        new = [run for run in runs if run.directory.absolute() not in queued]
        if not new:
            ids = dict.fromkeys(queued[run.directory.absolute()] for run in runs)
            newest = next(reversed(load_records(study.folder)))
            return SubmittedJob(job_id=", ".join(ids), runs=(), script=script_file(newest))
        return _submit(study, new, program, options, lock)


def _submit(
    study: Study,
    runs: Sequence[PlannedRun],
    program: Sequence[str],
    options: Sequence[str],
    lock: int,
) -> SubmittedJob:
    per_task = (study.slurm or SlurmSettings()).runs_per_task
    num_tasks = -(-len(runs) // per_task)
    _check_array(num_tasks, len(runs), per_task)
    record_path = next_record_file(study.folder)
    runs_file, script = record_path.with_suffix(".runs"), script_file(record_path)
    directories = tuple(str(run.directory.absolute()) for run in runs)
    write_text_atomic(runs_file, "".join(f"{directory}\n" for directory in directories))
    text = sbatch_text(
        study, num_tasks=num_tasks, runs_file=runs_file, program=program, options=options
    )
    write_text_atomic(script, text)
    for run in runs:
        withdraw_cancel(run.directory)
    record = JobRecord(
        job_id=None,
        runs=directories,
        runs_per_task=per_task,
        user=os.getuid(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    record.save(record_path)
    job_id = _call_sbatch(script, record_path, record, lock)
    replace(record, job_id=job_id).save(record_path)
    return SubmittedJob(job_id=job_id, runs=tuple(map(Path, directories)), script=script)


def _check_array(num_tasks: int, num_runs: int, per_task: int) -> None:
    limit = max_array_size()
    if not limit or num_tasks <= limit:
        return
    raise ConfigError(
        f"expected an array of at most {limit} tasks, the `MaxArraySize` of this cluster; got "
        f"{num_tasks}, for {num_runs} runs and `slurm.runs_per_task: {per_task}`. Set "
        f"`slurm.runs_per_task: {-(-num_runs // limit)}`, which makes so many runs of a task one "
        "after another, and give them the `slurm.time` that they need together."
    )


def _call_sbatch(script: Path, record_path: Path, record: JobRecord, lock: int) -> str:
    """Submit a script and return the job's number.

    The lock goes to ``sbatch`` too: should this process die, no other one looks into the queue
    before ``sbatch`` has ended.
    """
    try:
        printed = call("sbatch", "--parsable", str(script), pass_fds=(lock,))
        failure = None
    except CommandFailedError as error:
        printed, failure = "", error
    numbers = _NUMBER.findall(printed)
    # An answer may be lost on its way though the job was taken.
    job_id = numbers[-1] if numbers else find_job(script, record.user)
    if job_id is not None:
        return job_id
    if failure is None:
        raise unanswered("`sbatch` printed no number of a job")
    if _UNCERTAIN.search(str(failure)):
        # The record stays: the job may show in the queue later.
        raise unanswered(failure) from failure
    record_path.unlink()
    raise ConfigError(
        f"expected SLURM to take the job; it says: {failure}. Change the study's `slurm` block; "
        f"the job's script is `{script}`."
    ) from failure


def queued_runs(folder: Path) -> dict[Path, str]:
    """Find the runs that a job has in the queue: waiting, running, or put back into it.

    The cluster is asked only if the study has jobs with runs that are not finished.

    Returns:
        SLURM's number of the job and task, such as ``12_3``, by absolute run directory.

    Raises:
        ClusterError: If the cluster does not answer; its queue is unknown then, not empty.
        DataError: If a job's record cannot be read.
    """
    records = {path: record for path, record in _numbered(folder).items() if not record.is_over}
    live = live_tasks(
        {record.job_id: script_file(path) for path, record in records.items() if record.job_id}
    )
    queued: dict[Path, str] = {}
    for record in records.values():
        for task in live.get(record.job_id or "", ()):
            queued |= dict.fromkeys(record.runs_of(task), f"{record.job_id}_{task}")
    return queued


def cancel_jobs(folder: Path) -> list[Path]:
    """End all jobs of a study, and wait until nothing of them runs.

    Runs of theirs that have not ended become ``cancelled``.

    Returns:
        Directories of the runs that did.

    Raises:
        ClusterError: If the cluster does not answer, or does not end the jobs in three minutes.
    """
    if not load_records(folder):
        return []
    with jobs_lock(folder):
        queued = queued_runs(folder)
        if not queued:
            return []
        is_open = {run: not _has_ended(read_state(run)) for run in queued}
        for run in queued:
            if is_open[run]:
                request_cancel(run)
        ids = {job_id.partition("_")[0] for job_id in queued.values()}
        _end_jobs(
            {
                record.job_id: script_file(path)
                for path, record in load_records(folder).items()
                if record.job_id in ids
            }
        )
    return [run for run, job_id in queued.items() if _mark_cancelled(run, job_id, is_open[run])]


def _end_jobs(scripts: Mapping[str, Path]) -> None:
    """End jobs, given their scripts by their numbers."""
    deadline = time.monotonic() + _CANCEL_SECONDS
    while True:
        # Again and again: a run that takes the end for a preemption puts its job back.
        ask("scancel", *sorted(scripts))
        live = live_tasks(scripts)
        if not live:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"expected SLURM to end the jobs {', '.join(sorted(live))}; they are in its queue "
                f"{_CANCEL_SECONDS:.0f} s later. See `squeue`, and ask who runs the cluster."
            )
        time.sleep(_CANCEL_POLL_SECONDS)


def _has_ended(state: RunState | None) -> bool:
    return state is not None and state.status in _ENDED


def _mark_cancelled(run_dir: Path, job_id: str, was_open: bool) -> bool:
    state = read_state(run_dir)
    # One that was going on may have failed because its processes were ended.
    if state is not None and state.status in (FINISHED if was_open else _ENDED):
        return False
    state = state or RunState(status=RunStatus.CANCELLED, attempt=0, job=job_id)
    make_directory(sweep_folder(run_dir))
    write_state(run_dir, replace(state, status=RunStatus.CANCELLED, reason="cancelled"))
    return True


def _numbered(folder: Path) -> Mapping[Path, JobRecord]:
    """Read the records, and look for jobs whose submission was cut off before they had numbers."""
    records = load_records(folder)
    for path, record in records.items():
        if record.job_id is None and not record.is_over:
            found = find_job(script_file(path), record.user)
            if found is not None:
                records[path] = replace(record, job_id=found)
                records[path].save(path)
    return records
