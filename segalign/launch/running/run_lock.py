"""One process at a time runs a run: whoever holds the lock on ``RUN/sweep/lock``.

The lock belongs to an open file, not to a process. A supervisor's child inherits the file, so that
a child whose supervisor was killed keeps others away for as long as it lives, and nothing has to be
cleaned up after any kill. Pure standard library.
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from segalign.atomic import make_directory, storage_errors
from segalign.errors import ConfigError
from segalign.launch.running.run_folder import LOCK_FILE, sweep_folder

_HELD: Final = (errno.EWOULDBLOCK, errno.EACCES)
_UNSUPPORTED: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
# Those who look at a lock hold it for a moment themselves.
PATIENCE: Final = 1.0  # seconds
_logger = logging.getLogger(__name__)


class RunHeldError(ConfigError):
    """A run that another process runs already (exit code 69, ``EX_UNAVAILABLE``)."""

    exit_code = 69


def held_elsewhere(run_dir: Path) -> RunHeldError:
    """Word the error of a run that is running already."""
    return RunHeldError(
        f"expected a run that nobody runs; `{run_dir}` is running already. Wait for it, see "
        "`python main.py sweep status STUDY`, or stop it with `python main.py sweep cancel STUDY`."
    )


@contextlib.contextmanager
def run_lock(
    run_dir: Path, patience: float = PATIENCE, is_told: Callable[[], bool] = lambda: False
) -> Iterator[Sequence[int]]:
    """Hold the lock of a run.

    Args:
        run_dir: The run directory.
        patience: How long to wait for it, in seconds.
        is_told: Says that there is no more time to wait.

    Yields:
        What a child has to inherit so as to hold it too: one file descriptor, or none where the
        file system has no locks, which is logged.

    Raises:
        RunHeldError: If another process holds it.
        StorageError: If the file cannot be opened or locked.
    """
    make_directory(sweep_folder(run_dir))
    path = sweep_folder(run_dir) / LOCK_FILE
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with storage_errors(path):
            is_taken = take_lock(descriptor, patience, is_told=is_told)
        if is_taken is False:
            raise held_elsewhere(run_dir)
        if is_taken is None:
            _logger.warning(
                "`%s` is on a file system without locks: whether it is running already is told by "
                "its heartbeat alone",
                run_dir,
            )
        yield (descriptor,) if is_taken else ()
    finally:
        # Closed, not unlocked: unlocking would take it from a child that lives on.
        os.close(descriptor)


def is_locked(run_dir: Path) -> bool | None:
    """Say whether somebody on this machine holds a run's lock; None if that cannot be told."""
    try:
        descriptor = os.open(sweep_folder(run_dir) / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        # Shared, so that those who look do not see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in _HELD else None
    else:
        return False
    finally:
        os.close(descriptor)


def take_lock(
    descriptor: int,
    patience: float,
    *,
    is_told: Callable[[], bool] = lambda: False,
    poll: float = 0.01,
) -> bool | None:
    """Lock an open file for whoever has it open.

    Args:
        descriptor: The file.
        patience: How long to wait, in seconds.
        is_told: Says that there is no more time to wait.
        poll: Seconds between two attempts.

    Returns:
        False if another process holds it; None where the file system has no locks.

    Raises:
        OSError: If it cannot be locked for another reason.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return None
            if error.errno not in _HELD:
                raise
        else:
            return True
        if time.monotonic() > deadline or is_told():
            return False
        time.sleep(poll)
