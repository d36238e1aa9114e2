"""What a cluster's queue has, as `squeue` tells it."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from segalign.launch.slurm.slurm_commands import CommandFailedError, call, unanswered

# Base number, task of the array, and script of each task that waits, runs or is ending. A job that
# is put back is among those that are ending until its nodes are free.
_QUEUE_FORMAT: Final = "--format=%F|%K|%o"
_UNKNOWN_JOB: Final = "Invalid job id"


def find_job(script: Path, user: int) -> str | None:
    """Find a user's job in the queue by its script; None if none has it.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    rows = ask("squeue", "--noheader", "--array", f"--user={user}", _QUEUE_FORMAT)
    return next((base for base, _, command in _rows(rows) if _is_same(command, script)), None)


def live_tasks(scripts: Mapping[str, Path]) -> dict[str, list[int]]:
    """Return the tasks that the queue has of array jobs, by the jobs' numbers.

    A number is given again after a while: a job with another script is somebody else's.

    Args:
        scripts: Their scripts, likewise.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    live: dict[str, list[int]] = {}
    if scripts:
        jobs = f"--jobs={','.join(scripts)}"
        rows = ask("squeue", "--noheader", "--array", jobs, _QUEUE_FORMAT)
        for base, task, command in _rows(rows):
            if base in scripts and _is_same(command, scripts[base]):
                live.setdefault(base, []).append(int(task))
    return live


def _is_same(command: str, script: Path) -> bool:
    # The study's folder may have been named by another path, through a link or with `..`.
    return os.path.realpath(command) == os.path.realpath(script)


def _rows(text: str) -> list[tuple[str, str, str]]:
    found = (re.fullmatch(r"(\d+)\|(\d+)\|(.*)", line.strip()) for line in text.splitlines())
    return [(row[1], row[2], row[3]) for row in found if row is not None]


def ask(*command: str) -> str:
    """Run a command on jobs; those that the cluster has forgotten are no error.

    Raises:
        ClusterError: If the cluster does not answer.
    """
    try:
        return call(*command)
    except CommandFailedError as error:
        # So it answers for a single job that ended a while ago.
        if _UNKNOWN_JOB in str(error):
            return ""
        raise unanswered(error) from error
