"""How far runs are, seen from outside: from what they leave on disk, and who holds their locks."""

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final

from segalign.errors import ConfigError
from segalign.launch.plan import PlannedRun
from segalign.launch.running.cancel_request import is_cancel_requested
from segalign.launch.running.heartbeat import beat_limit, last_beat
from segalign.launch.running.metrics_tail import logged_step, metrics_file
from segalign.launch.running.run_lock import is_locked
from segalign.launch.running.run_spec import RunSpec, read_spec
from segalign.launch.running.run_state import FINISHED, RunState, RunStatus, read_state

_NONE_QUEUED: Final[Mapping[Path, str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ObservedRun:
    """A run and where it stands.

    Attributes:
        run: The run.
        status: Where it stands, all things considered.
        state: What its supervisor wrote last; None if it was never started.
        step: Optimizer steps that its training has logged; None before the first.
        max_steps: Optimizer steps that it is to make; None if they are not limited.
        beat_age: Seconds since its supervisor was last alive; None if it does not run.
        progress_age: Seconds since it last logged a step, or since it was started; None if it does
            not train. A run that is alive and logs no step is slow, not dead.
    """

    run: PlannedRun
    status: RunStatus
    state: RunState | None = None
    step: int | None = None
    max_steps: int | None = None
    beat_age: float | None = None
    progress_age: float | None = None


def observe(
    runs: Sequence[PlannedRun], queued: Mapping[Path, str] = _NONE_QUEUED
) -> list[ObservedRun]:
    """See how far runs are.

    Args:
        runs: The runs.
        queued: Jobs of runs that a cluster has in its queue, pending or running, by run directory.
    """
    jobs = {directory.absolute(): job for directory, job in queued.items()}
    return [_observe(run, jobs.get(run.directory.absolute())) for run in runs]


def _observe(run: PlannedRun, job: str | None) -> ObservedRun:
    directory = run.directory
    spec = read_spec(directory)
    if spec is not None and spec.run_id != run.run_id:
        return _of_another_config(run, spec)
    state, is_held = _state_and_lock(directory)
    status = _status(directory, state, is_held, job)
    is_running = status is RunStatus.RUNNING
    step = None if state is None else logged_step(directory)
    max_steps = None if spec is None else spec.max_steps
    if step is not None and max_steps is not None:
        # Some rows are numbered by the steps before them, others by those before the next.
        step = min(step, max_steps)
    return ObservedRun(
        run=run,
        status=status,
        state=state,
        step=step,
        max_steps=max_steps,
        beat_age=_age(last_beat(directory)) if is_running else None,
        progress_age=_progress_age(directory, state) if is_running else None,
    )


def _state_and_lock(directory: Path) -> tuple[RunState | None, bool | None]:
    """Read both as they stood at one moment: a run may start or end in between."""
    while True:
        state = read_state(directory)
        is_held = is_locked(directory)
        if is_held or state is None or state.status is not RunStatus.RUNNING:
            return state, is_held
        if read_state(directory) == state:
            return state, is_held


def _status(
    directory: Path, state: RunState | None, is_held: bool | None, job: str | None
) -> RunStatus:
    if state is not None and state.status in FINISHED:
        return state.status
    is_held_here = is_held and not _is_lost_elsewhere(directory, state)
    if is_held_here or _is_running_elsewhere(directory, state, is_held):
        return RunStatus.RUNNING
    if is_cancel_requested(directory) and not _has_failed(state):
        return RunStatus.CANCELLED
    if job is not None and not _ended_in(state, job):
        return RunStatus.QUEUED
    if state is None:
        return RunStatus.PENDING
    return RunStatus.DEAD if state.status is RunStatus.RUNNING else state.status


def _is_running_elsewhere(directory: Path, state: RunState | None, is_held: bool | None) -> bool:
    """Judge by the heartbeat a run whose lock, if it is held, cannot be seen here."""
    if state is None or state.status is not RunStatus.RUNNING:
        return False
    if is_held is False and state.host == socket.gethostname():
        return False
    age = _age(last_beat(directory))
    return age is not None and age < beat_limit(directory)


def _is_lost_elsewhere(directory: Path, state: RunState | None) -> bool:
    """Say whether another machine stopped beating: a file server keeps its lock for a while."""
    if state is None or state.status is not RunStatus.RUNNING:
        return False
    age = _age(last_beat(directory))
    is_here = state.host == socket.gethostname()
    return not is_here and age is not None and age >= beat_limit(directory)


def _has_failed(state: RunState | None) -> bool:
    return state is not None and state.status is RunStatus.FAILED


def _ended_in(state: RunState | None, job: str) -> bool:
    """Tell a job that goes on after this run, with others, from one that is to do it."""
    ended = (RunStatus.FAILED, RunStatus.CANCELLED)
    return state is not None and state.status in ended and state.job == job


def _progress_age(directory: Path, state: RunState | None) -> float | None:
    if state is None or "fit" in state.stages_done:
        return None
    times = []
    try:
        times.append(datetime.fromisoformat(state.started).timestamp())
        times.append(metrics_file(directory).stat().st_mtime)
    except (OSError, ValueError):
        pass
    return _age(max(times, default=None))


def _age(moment: float | None) -> float | None:
    # The clock of a file server may be ahead.
    return None if moment is None else max(0.0, time.time() - moment)


def _of_another_config(run: PlannedRun, spec: RunSpec) -> ObservedRun:
    reason = (
        f"expected a run directory of config {run.run_id}; `{run.directory}` is that of config "
        f"{spec.run_id}. Move it away."
    )
    state = RunState(status=RunStatus.FAILED, exit_code=ConfigError.exit_code, reason=reason)
    return ObservedRun(run=run, status=RunStatus.FAILED, state=state)
