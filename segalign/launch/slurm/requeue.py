"""Put a SLURM job back into its queue, from inside.

Pure standard library. Nothing here raises: what cannot be done is told in the outcome.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_TIMEOUT = 60.0  # seconds; a busy controller may take tens of them


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
    saved, and once for each job, not on every rank.

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


def _ask(job: str, environment: Mapping[str, str]) -> str | None:
    """Call ``scontrol``; return why it failed, in one line, or None."""
    try:
        completed = subprocess.run(  # noqa: S603
            ["scontrol", "requeue", job],  # noqa: S607
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
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
