"""A file that is touched again and again: a dead supervisor stops, a slow run's does not.

The file holds how often it is touched, so that whoever looks need not be told. Pure standard
library.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from segalign.atomic import write_text_atomic
from segalign.launch.running.run_folder import HEARTBEAT_FILE, sweep_folder

DEFAULT_SECONDS: Final = 15.0
# A loaded file server may lose a beat or two.
MISSED_BEATS: Final = 4


def start_heartbeat(run_dir: Path, seconds: float) -> None:
    """Beat for the first time, and tell how often it will.

    Raises:
        StorageError: If the file cannot be written.
    """
    write_text_atomic(sweep_folder(run_dir) / HEARTBEAT_FILE, f"{seconds}\n")


def beat(run_dir: Path) -> None:
    """Beat again; a run need not end because a disk is away for a moment."""
    with contextlib.suppress(OSError):
        os.utime(sweep_folder(run_dir) / HEARTBEAT_FILE)


def last_beat(run_dir: Path) -> float | None:
    """Return when it last beat, in seconds since 1970; None if it never did."""
    try:
        return (sweep_folder(run_dir) / HEARTBEAT_FILE).stat().st_mtime
    except OSError:
        return None


def beat_limit(run_dir: Path) -> float:
    """Return after how many seconds without a beat a supervisor counts as dead."""
    try:
        seconds = float((sweep_folder(run_dir) / HEARTBEAT_FILE).read_text())
    except (OSError, ValueError):
        seconds = DEFAULT_SECONDS
    return MISSED_BEATS * seconds


def beats_on(run_dir: Path, is_told: Callable[[], bool] = lambda: False) -> bool:
    """Watch until a beat comes or is overdue, or until told to stop; say whether one came.

    Only changes count, not the age of a beat: clocks of machines differ.
    """
    first, deadline = last_beat(run_dir), time.monotonic() + beat_limit(run_dir)
    while time.monotonic() < deadline and not is_told():
        if last_beat(run_dir) != first:
            return True
        time.sleep(0.05)
    return False
