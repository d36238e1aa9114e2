"""Stop runs on this machine, so that no process of theirs is left."""

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from segalign.errors import SegalignError, StorageError
from segalign.launch.plan import PlannedRun, unique_runs
from segalign.launch.running.cancel_request import request_cancel
from segalign.launch.running.observing import ObservedRun, observe
from segalign.launch.running.run_folder import sweep_folder
from segalign.launch.running.run_lock import run_lock
from segalign.launch.running.run_processes import (
    find_run_processes,
    find_supervisors,
    kill_all,
    terminate,
    wait_until_gone,
)
from segalign.launch.running.run_state import FINISHED, RunStatus, read_state, write_state

_PATIENCE: Final = 30.0  # seconds; a checkpoint may be on its way
_KILL_PATIENCE: Final = 10.0  # seconds


def cancel_local(runs: Sequence[PlannedRun]) -> list[Path]:
    """Stop runs, and keep those from starting that wait; finished runs stay as they are.

    All of a run's processes on this machine are gone when this returns. Its supervisor on another
    machine, or a job that a cluster starts later, finds the request and stops by itself.

    Returns:
        Directories of the runs that were running here.

    Raises:
        StorageError: If it cannot be written down; processes are gone all the same.
    """
    open_runs = [one for one in observe(unique_runs(runs)) if one.status not in FINISHED]
    troubles = _request(open_runs)
    directories = [one.run.directory for one in open_runs]
    running = [one.run.directory for one in open_runs if _runs_here(one)]
    _end_processes(directories)
    for directory in directories:
        with contextlib.suppress(SegalignError):
            _write_down(directory)
    if troubles:
        raise troubles[0]
    return running


def _runs_here(observed: ObservedRun) -> bool:
    if observed.status is not RunStatus.RUNNING:
        return False
    return observed.state is None or observed.state.host == socket.gethostname()


def _request(observed: Sequence[ObservedRun]) -> list[StorageError]:
    troubles = []
    for one in observed:
        if not sweep_folder(one.run.directory).is_dir():
            continue
        try:
            request_cancel(one.run.directory)
        except StorageError as error:
            troubles.append(error)
    return troubles


def _end_processes(run_dirs: Sequence[Path]) -> None:
    """Let supervisors end their runs in order; kill what does not, and what they leave."""
    known = find_run_processes(run_dirs)
    supervisors = find_supervisors(run_dirs)
    terminate(supervisors)
    wait_until_gone(supervisors, _PATIENCE)
    # What a killed supervisor has left never heard of the request.
    left = list(dict.fromkeys([*known, *find_run_processes(run_dirs)]))
    kill_all(left)
    wait_until_gone(left, _KILL_PATIENCE)


def _write_down(run_dir: Path) -> None:
    """Write that a run is cancelled, unless its supervisor has, or it was not to go on."""
    with run_lock(run_dir):
        state = read_state(run_dir)
        if state is None or state.status not in (RunStatus.RUNNING, RunStatus.PREEMPTED):
            return
        ended = state.ended or datetime.now(UTC).isoformat(timespec="seconds")
        write_state(run_dir, replace(state, status=RunStatus.CANCELLED, ended=ended))
