"""Why a process failed, in one line, from what it printed last. Pure standard library."""

import re
import signal
from pathlib import Path
from typing import Final

from segalign.errors import PreemptedError, PrunedError

_TAIL: Final = 64 * 1024  # bytes
_LONGEST: Final = 500  # characters
# `srun --label` puts the number of a task before each line.
_LINE = re.compile(r"^(?:\d+: )?(.*)$")
_TOLD: Final = ("error: ", "stopped: ")
_PRUNED: Final = "stopped: pruned by the searcher"
_PREEMPTED: Final = re.compile(r"stopped: SIG\w+ came")
# What cannot be written cannot be told in a log beside it, either.
_KNOWN: Final = {75: "; perhaps the disk is full or cannot be written: free some space"}
_TRACEBACK: Final = "Traceback (most recent call last):"


def failure_reason(log: Path, exit_code: int, start: int = 0) -> str:
    """Say why a process failed.

    Args:
        log: What it printed.
        exit_code: Its exit code; negative, or 128 and more, is the signal that ended it.
        start: Where in the log it began to print.
    """
    lines = _tail(log, start)
    told = [line for line in lines if line.startswith(_TOLD)]
    if exit_code in (PreemptedError.exit_code, PrunedError.exit_code):
        # Other processes may have failed because one of them stopped.
        told = [line for line in told if line.startswith("stopped: ")] or told
    if told:
        return told[-1].partition(": ")[2][:_LONGEST]
    signalled = signal_reason(exit_code)
    raised = _last_exception(lines)
    if signalled is None and raised is None:
        return f"ended with exit code {exit_code} and no message{_KNOWN.get(exit_code, '')}"
    return signalled or (raised or "")[:_LONGEST]


def unmasked_code(log: Path, exit_code: int, start: int = 0) -> int:
    """Find the exit code of the process that ended first, if a launcher hides it.

    A launcher ends the other processes of a run when one has ended, and returns the largest code:
    that of a signal, which the others got from the launcher itself.

    Args:
        log: What they printed.
        exit_code: The exit code of the launcher.
        start: Where in the log they began to print.

    Returns:
        86 or 85 if one says that it was pruned or preempted; 1 if one has failed, for the log does
        not tell with which code; else the exit code of the launcher.
    """
    if signal_reason(exit_code) is None:
        return exit_code
    lines = _tail(log, start)
    if any(line.startswith(_PRUNED) for line in lines):
        return PrunedError.exit_code
    if any(_PREEMPTED.match(line) for line in lines):
        return PreemptedError.exit_code
    raised = _last_exception(lines) or ""
    # The launcher's signal also ends the workers of a process, which says so.
    has_raised = raised != "" and "killed by signal: Terminated" not in raised
    has_failed = has_raised or any(line.startswith("error: ") for line in lines)
    return 1 if has_failed else exit_code


def signal_reason(exit_code: int) -> str | None:
    """Name the signal that an exit code tells of; None if it tells of none."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number not in {*signal.Signals}:
        return None
    text = f"killed by signal {number} ({signal.Signals(number).name})"
    return f"{text}: out of memory?" if number == signal.SIGKILL else text


def _tail(log: Path, start: int) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(start, log.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    # Progress bars write over their line.
    return [_unlabelled(line) for line in re.split(r"[\r\n]+", text)]


def _unlabelled(line: str) -> str:
    match = _LINE.match(line)
    return line if match is None else match.group(1)


def _last_exception(lines: list[str]) -> str | None:
    """Find the line of the last traceback that names its exception."""
    starts = [number for number, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    if not starts:
        return None
    rest = lines[starts[-1] + 1 :]
    return next((line for line in rest if line and not line.startswith(" ")), None)
