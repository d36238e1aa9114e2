"""A request that a run be stopped, and that nobody starts it until it is withdrawn.

It is a file, so that it reaches supervisors on other machines, those that are only starting, and
jobs that are still in a queue. Pure standard library.
"""

from pathlib import Path

from segalign.atomic import make_directory, storage_errors
from segalign.launch.running.run_folder import CANCEL_FILE, sweep_folder


def request_cancel(run_dir: Path) -> None:
    """Ask for a run to be stopped and not to be started.

    Raises:
        StorageError: If it cannot be written down.
    """
    make_directory(sweep_folder(run_dir))
    path = sweep_folder(run_dir) / CANCEL_FILE
    with storage_errors(path):
        path.touch()


def withdraw_cancel(run_dir: Path) -> None:
    """Let a run be started again; without a request, do nothing.

    Raises:
        StorageError: If the request cannot be removed.
    """
    path = sweep_folder(run_dir) / CANCEL_FILE
    with storage_errors(path):
        path.unlink(missing_ok=True)


def is_cancel_requested(run_dir: Path) -> bool:
    """Say whether a run is to be stopped and not to be started."""
    return (sweep_folder(run_dir) / CANCEL_FILE).exists()
