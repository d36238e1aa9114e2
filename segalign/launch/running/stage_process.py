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

_POLL: Final = 0.1  # seconds


def run_stage(
    command: Sequence[str],
    log: Path,
    *,
    inherited: Sequence[int],
    take_forwarded: Callable[[], Sequence[signal.Signals]],
    parting: Callable[[], Sequence[signal.Signals]],
    beat: Callable[[], None],
    beat_seconds: float,
    grace_seconds: float,
) -> int:
    """Run a command as a process group of its own, and see it to its end.

    Args:
        command: The command line.
        log: What it prints is appended here.
        inherited: File descriptors that it keeps.
        take_forwarded: Returns the signals that the group is to get and that have come since the
            last call.
        parting: Returns the signals that are to end the group, none as long as it may go on. It
            gets one after another, and SIGKILL after the last.
        beat: Called every ``beat_seconds``.
        beat_seconds: See ``beat``.
        grace_seconds: How long a group may take after each of them.

    Returns:
        The exit code; negative is the signal that ended it. No process of the group is left.

    Raises:
        ConfigError: If the command cannot be started.
        StorageError: If the log cannot be written.
    """
    process = _start(command, log, inherited)
    try:
        return _wait(process, take_forwarded, parting, beat, beat_seconds, grace_seconds)
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
    take_forwarded: Callable[[], Sequence[signal.Signals]],
    parting: Callable[[], Sequence[signal.Signals]],
    beat: Callable[[], None],
    beat_seconds: float,
    grace_seconds: float,
) -> int:
    next_beat = time.monotonic() + beat_seconds
    told, next_telling = 0, 0.0
    while (code := process.poll()) is None:
        now = time.monotonic()
        if now >= next_beat:
            beat()
            next_beat = now + beat_seconds
        for name in take_forwarded():
            _tell(process, name)
        if (names := parting()) and now >= next_telling:
            _tell(process, names[told] if told < len(names) else signal.SIGKILL)
            told, next_telling = told + 1, now + grace_seconds
        time.sleep(_POLL)
    return code


def _tell(process: subprocess.Popen[bytes], name: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, name)
