"""The processes of runs on this machine, recognised so that no other process is ever touched."""

import contextlib
import itertools
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import psutil

from segalign.launch.running.run_folder import config_file
from segalign.launch.running.run_lock import is_locked
from segalign.launch.running.run_state import RunStatus, read_state

_STAGES: Final = ("fit", "test")
# The time at which a process began is derived from clocks that are set now and then.
_SAME_MOMENT: Final = 2.0  # seconds
_POLL: Final = 0.05  # seconds


def find_supervisors(run_dirs: Sequence[Path]) -> list[psutil.Process]:
    """Find the supervisors of runs: as states name them, and those that are only starting."""
    named = [_named_supervisor(run_dir) for run_dir in run_dirs]
    wanted = {("execute", str(run_dir.absolute())) for run_dir in run_dirs}
    return _distinct([*(one for one in named if one is not None), *_with_arguments(wanted)])


def find_run_processes(run_dirs: Sequence[Path]) -> list[psutil.Process]:
    """Find supervisors, what they have started, and what has outlived its supervisor."""
    configs = {
        ("--config", str(config_file(run_dir.absolute(), stage)))
        for run_dir in run_dirs
        for stage in _STAGES
    }
    roots = [*find_supervisors(run_dirs), *_with_arguments(configs)]
    return _distinct([*roots, *(child for root in roots for child in _descendants(root))])


def terminate(processes: Iterable[psutil.Process]) -> None:
    """Ask processes to stop; psutil refuses numbers that have gone to other processes."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Kill processes, and what they have started meanwhile."""
    for process in list(processes):
        for one in [process, *_descendants(process)]:
            with contextlib.suppress(psutil.Error):
                one.kill()


def wait_until_gone(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end; return those that have not."""
    deadline = time.monotonic() + seconds
    while (left := [one for one in processes if _is_alive(one)]) and time.monotonic() < deadline:
        time.sleep(_POLL)
    return left


def _named_supervisor(run_dir: Path) -> psutil.Process | None:
    """Open the process that a state names, if it is still that one and its run is locked."""
    state = read_state(run_dir)
    if state is None or state.status is not RunStatus.RUNNING or not is_locked(run_dir):
        return None
    # What a cluster has started, it also ends.
    if state.host != socket.gethostname() or state.job is not None:
        return None
    try:
        process = psutil.Process(state.pid)
        is_same = abs(process.create_time() - state.pid_created) < _SAME_MOMENT
    except psutil.Error:
        return None
    return process if is_same else None


def _with_arguments(wanted: set[tuple[str, str]]) -> list[psutil.Process]:
    """Find processes in whose command line two arguments follow each other."""
    found = []
    for process in psutil.process_iter():
        try:
            arguments = process.cmdline()
        except psutil.Error:
            continue
        if wanted.intersection(itertools.pairwise(arguments)):
            found.append(process)
    return found


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _is_alive(process: psutil.Process) -> bool:
    # A zombie has ended; its parent only has not looked.
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _distinct(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [one for one in dict.fromkeys(processes) if _is_alive(one)]
