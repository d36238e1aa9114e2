"""The process of one stage of a run, from its start until nothing of it is left."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from segalign.atomic import storage_errors
from segalign.errors import ConfigError
from segalign.launch.running.stopping import StopRequest

_POLL: Final = 0.1  # seconds


def run_stage(
    command: Sequence[str],
    log: Path,
    *,
    inherited: Sequence[int],
    stop: StopRequest,
    beat: Callable[[], None],
    beat_seconds: float,
    grace_seconds: float,
) -> int:
    """Run a command as a process group of its own, and see it to its end.

    Args:
        command: The command line.
        log: What it prints is appended here.
        inherited: File descriptors that it keeps.
        stop: As soon as it is asked, the group gets SIGTERM.
        beat: Called every ``beat_seconds``.
        beat_seconds: See ``beat``.
        grace_seconds: How long a group that got SIGTERM may take before SIGKILL.

    Returns:
        The exit code; negative is the signal that ended it. No process of the group is left.

    Raises:
        ConfigError: If the command cannot be started.
        StorageError: If the log cannot be written.
    """
    process = _start(command, log, inherited)
    try:
        return _wait(process, stop, beat, beat_seconds, grace_seconds)
    finally:
        # Workers and other ranks may have outlived the process that started them.
        _tell(process, signal.SIGKILL)
        process.wait()


def _start(command: Sequence[str], log: Path, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    with storage_errors(log):
        output = log.open("ab")
    try:
        return subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
            process_group=0,
        )
    except OSError as error:
        raise ConfigError(
            f"expected to be able to start `{command[0]}`; got: {error.strerror}. "
            "Check the launcher and the program of the study."
        ) from error
    finally:
        output.close()


def _wait(
    process: subprocess.Popen[bytes],
    stop: StopRequest,
    beat: Callable[[], None],
    beat_seconds: float,
    grace_seconds: float,
) -> int:
    next_beat = time.monotonic() + beat_seconds
    deadline: float | None = None
    while (code := process.poll()) is None:
        now = time.monotonic()
        if now >= next_beat:
            beat()
            next_beat = now + beat_seconds
        for name in stop.take_forwarded():
            _tell(process, name)
        if stop.signal is not None and deadline is None:
            _tell(process, signal.SIGTERM)
            deadline = now + grace_seconds
        if deadline is not None and now > deadline:
            _tell(process, signal.SIGKILL)
        time.sleep(_POLL)
    return code


def _tell(process: subprocess.Popen[bytes], name: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, name)
