"""How far a run of a study is: a file that its supervisor writes, whole or not at all."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from segalign.atomic import write_text_atomic
from segalign.json_text import parse_json
from segalign.launch.running.run_folder import STATE_FILE, sweep_folder


class RunStatus(StrEnum):
    """Where a run stands. The file knows the first six; the others are seen from outside."""

    RUNNING = "running"
    PREEMPTED = "preempted"  # stopped by a signal; goes on from its checkpoint
    FAILED = "failed"
    CANCELLED = "cancelled"
    PRUNED = "pruned"  # stopped by a searcher; counts as finished
    DONE = "done"
    PENDING = "pending"  # never started
    QUEUED = "queued"  # a cluster has it in its queue
    DEAD = "dead"  # the file says that it is running, but nobody runs it


FINISHED = (RunStatus.DONE, RunStatus.PRUNED)
ACTIVE = (RunStatus.RUNNING, RunStatus.QUEUED)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What ``state.json`` holds.

    Attributes:
        status: One of the first six of `RunStatus`.
        attempt: Number of the last attempt, from 1.
        stages_done: Stages that have ended well.
        exit_code: Of the last process; negative is the signal that ended it. None while it runs.
        reason: Why it failed, on one line.
        started: When the last attempt began, ISO 8601 in UTC.
        ended: When it ended.
        seconds: How long all attempts took, but for one that runs or was killed.
        host: Where it runs or ran.
        pid: Process number of its supervisor, which leads its process group.
        pid_created: When that process began, seconds since 1970, as psutil has it.
        job: SLURM's number of its job, such as ``12`` or ``12_3``.
    """

    status: RunStatus
    attempt: int = 1
    stages_done: tuple[str, ...] = ()
    exit_code: int | None = None
    reason: str = ""
    started: str = ""
    ended: str | None = None
    seconds: float = 0.0
    host: str = ""
    pid: int = 0
    pid_created: float = 0.0
    job: str | None = None


def read_state(run_dir: Path) -> RunState | None:
    """Read a run's state; None if it was never started, or the file cannot be read."""
    try:
        content: dict[str, Any] = parse_json((sweep_folder(run_dir) / STATE_FILE).read_bytes())
        stages = tuple(content.pop("stages_done"))
        status = RunStatus(content.pop("status"))
        return RunState(**content, status=status, stages_done=stages)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_state(run_dir: Path, state: RunState) -> None:
    """Write a run's state, whole or not at all.

    Raises:
        StorageError: If it cannot be written.
    """
    text = json.dumps(asdict(state), indent=1, allow_nan=False)
    write_text_atomic(sweep_folder(run_dir) / STATE_FILE, text + "\n")
