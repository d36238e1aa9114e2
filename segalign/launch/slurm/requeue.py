"""Put a SLURM job back into its queue, from inside.

Pure standard library. Nothing here raises: what cannot be done is told in the outcome.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TIMEOUT = 60.0  # seconds; a busy controller may take tens of them
_LOOK_TIMEOUT = 10.0  # seconds; a job that is being ended has few of them
# How `squeue` writes that a job has no end, or no time left.
_NO_TIME = ("", "NONE", "N/A", "Unknown", "0:00", "INVALID")


@dataclass(frozen=True, kw_only=True)
class RequeueOutcome:
    """What became of a request to be requeued.

    Attributes:
        job: The job, as ``scontrol`` names it; None outside of a job.
        requeued: Whether it is back in the queue.
        reason: Why it is not, in one line; empty if it is.
    """

    job: str | None
    requeued: bool
    reason: str = ""

    def __str__(self) -> str:
        """Say in one line what became of it."""
        if self.job is None:
            return self.reason
        if self.requeued:
            return f"SLURM job {self.job} is back in the queue"
        return f"SLURM job {self.job} is not requeued: {self.reason}"


def requeue(max_requeues: int, environment: Mapping[str, str] | None = None) -> RequeueOutcome:
    """Ask SLURM to end this job and to start it again later.

    SLURM then ends the job with SIGTERM and, if that does not help, SIGKILL: ask only when all is
    saved, and once for each job, not on every rank. A job that somebody cancels with ``scancel``
    stays away, though its processes get the same signals as those of one that is taken back.

    Args:
        max_requeues: How often the job may be put back, counted over its whole life.
        environment: Variables that SLURM has set; by default those of this process.
    """
    variables = os.environ if environment is None else environment
    job = slurm_job(variables)
    if job is None:
        return RequeueOutcome(job=None, requeued=False, reason="there is no SLURM job")
    done = restart_count(variables)
    if done >= max_requeues:
        reason = f"it has been {done} times, and {max_requeues} are allowed"
        return RequeueOutcome(job=job, requeued=False, reason=reason)
    if _is_cancelled(job, variables):
        return RequeueOutcome(job=job, requeued=False, reason="it was cancelled")
    failure = _ask(job, variables)
    return RequeueOutcome(job=job, requeued=failure is None, reason=failure or "")


def slurm_job(environment: Mapping[str, str] | None = None) -> str | None:
    """Name the job or array task that a process runs in; None if it runs in none.

    The number of an array alone, which is also that of its last task, would name all its tasks.
    """
    variables = os.environ if environment is None else environment
    array, task = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return variables.get("SLURM_JOB_ID") or None


def restart_count(environment: Mapping[str, str]) -> int:
    """Return how often this job has been requeued so far."""
    count = environment.get("SLURM_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0


def _is_cancelled(job: str, environment: Mapping[str, str]) -> bool:
    """Say whether SLURM is ending a job for good, which a requeue would undo.

    One that is cancelled has an end, and time left until its limit. One that is taken back, and is
    ending too, has no end; one whose time is over has none left.
    """
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T|%e|%L"]
    try:
        completed = _call(command, environment, _LOOK_TIMEOUT)
    except (OSError, ValueError, subprocess.SubprocessError):
        return False
    state, end, left = (*completed.stdout.strip().split("|"), "", "", "")[:3]
    if completed.returncode != 0 or state not in ("CANCELLED", "COMPLETING"):
        return False
    return state == "CANCELLED" or (end not in _NO_TIME and left not in _NO_TIME)


def _ask(job: str, environment: Mapping[str, str]) -> str | None:
    """Call ``scontrol``; return why it failed, in one line, or None."""
    try:
        completed = _call(["scontrol", "requeue", job], environment, _TIMEOUT)
    except FileNotFoundError:
        return "`scontrol` is not on the PATH"
    except subprocess.TimeoutExpired:
        return f"`scontrol` has not answered for {_TIMEOUT:.0f} s"
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"`scontrol` cannot be started ({error})"
    if completed.returncode == 0:
        return None
    said = " ".join((completed.stderr or completed.stdout).split())
    return f"`scontrol` ended with code {completed.returncode}: {said or 'it said nothing'}"


def _call(
    command: Sequence[str], environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
