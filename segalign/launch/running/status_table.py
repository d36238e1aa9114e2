"""How far the runs of a study are, as people read it."""

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_folder import SUPERVISOR_LOG, attempt_log, sweep_folder
from segalign.launch.running.run_state import RunStatus
from segalign.metrics.report_table import ReportTable

_HEADINGS: Final = ["variant", "seed", "run", "status", "step", "alive", "note"]
# Most runs log a step every few seconds; a validation or the first batch may take minutes.
_SLOW_SECONDS: Final = 600.0
# A line that does not fit makes a table unreadable.
_NOTE_WIDTH: Final = 48
# As whoever asked for it has written it down, after the number of the job.
_NOT_REQUEUED: Final = re.compile(r"not requeued: [^;]*")
_ORDER: Final = (
    RunStatus.RUNNING,
    RunStatus.QUEUED,
    RunStatus.PENDING,
    RunStatus.PREEMPTED,
    RunStatus.PRUNED,
    RunStatus.CANCELLED,
    RunStatus.DEAD,
    RunStatus.FAILED,
)


def status_rows(observed: Sequence[ObservedRun]) -> ReportTable:
    """List runs, each with its step, when it was last alive, and in short what is wrong."""
    return ReportTable(title="runs", headings=list(_HEADINGS), rows=[_row(one) for one in observed])


def summary(observed: Sequence[ObservedRun]) -> str:
    """Count runs by status, such as ``4 of 6 done, 1 running, 1 failed``."""
    counts = Counter(one.status for one in observed)
    parts = [f"{counts[RunStatus.DONE]} of {len(observed)} done"]
    parts += [f"{counts[status]} {status}" for status in _ORDER if counts[status]]
    return ", ".join(parts)


def failure_lines(observed: Sequence[ObservedRun]) -> list[str]:
    """Say in full why runs have failed or died, and which log tells more; one line for each reason.

    So does a run that was stopped and could not be put back into the queue.
    """
    alike: dict[str, list[ObservedRun]] = {}
    for one in observed:
        if _is_wrong(one):
            # Runs fail of one reason, each with its own directory in it.
            reason = _note(one).replace(str(one.run.directory), "").replace(one.run.run_id, "")
            alike.setdefault(f"{one.status}: {reason}", []).append(one)
    return [_failure_line(group) for group in alike.values()]


def num_failed(observed: Sequence[ObservedRun]) -> int:
    """Count the runs that `failure_lines` tells of."""
    return sum(map(_is_wrong, observed))


def describe_change(observed: ObservedRun) -> str:
    """Say in one line what a run does now."""
    run = observed.run
    text = f"{run.label}, seed {run.seed} ({run.run_id}): {observed.status}"
    note = _note(observed)
    return f"{text}: {note}" if note else text


def describe_seconds(seconds: float) -> str:
    """Write a duration as people say it, such as ``12 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} days"


def _failure_line(group: Sequence[ObservedRun]) -> str:
    first, others = group[0], len(group) - 1
    line = describe_change(first)
    if others:
        line = f"{line.rstrip('.')}; the same for {others} more run{'s' if others > 1 else ''}."
    return f"{line}{_log(first)}"


def _is_wrong(one: ObservedRun) -> bool:
    if one.status is RunStatus.PREEMPTED:
        return _not_requeued(one) is not None
    return one.status in (RunStatus.FAILED, RunStatus.DEAD)


def _row(one: ObservedRun) -> list[str]:
    alive = "" if one.beat_age is None else f"{describe_seconds(one.beat_age)} ago"
    note = textwrap.shorten(_note(one), _NOTE_WIDTH, placeholder=" ...")
    return [one.run.label, str(one.run.seed), one.run.run_id, one.status, _step(one), alive, note]


def _step(one: ObservedRun) -> str:
    if one.step is None:
        return ""
    return str(one.step) if one.max_steps is None else f"{one.step}/{one.max_steps}"


def _note(one: ObservedRun) -> str:
    if one.status is RunStatus.FAILED:
        return _failure(one)
    if one.status is RunStatus.DEAD:
        return "nobody runs it any more: killed, or its machine went down"
    if one.status is RunStatus.PRUNED and one.state is not None:
        return one.state.reason
    if one.status is RunStatus.PREEMPTED:
        return _preemption(one)
    if one.status is RunStatus.RUNNING:
        return _activity(one)
    return ""


def _preemption(one: ObservedRun) -> str:
    why = _not_requeued(one)
    if why is None:
        return "goes on from its checkpoint with `sweep resume`"
    return f"`sweep resume` goes on; {why}"


def _not_requeued(one: ObservedRun) -> str | None:
    """Find why a run's job did not go back into its queue; None if nothing is known of it."""
    found = None if one.state is None else _NOT_REQUEUED.search(one.state.reason)
    return None if found is None else found.group()


def _failure(one: ObservedRun) -> str:
    if one.state is None:
        return ""
    code = one.state.exit_code
    # A negative one is a signal, which the reason names.
    return one.state.reason if code is None or code < 0 else f"exit {code}: {one.state.reason}"


def _activity(one: ObservedRun) -> str:
    if one.state is not None and "fit" in one.state.stages_done:
        return "testing"
    if one.progress_age is not None and one.progress_age >= _SLOW_SECONDS:
        return f"no step for {describe_seconds(one.progress_age)}"
    return ""


def _log(one: ObservedRun) -> str:
    """Name the file that tells more, if there is one."""
    attempt = 1 if one.state is None else one.state.attempt
    directory = one.run.directory
    logs: list[Path] = [attempt_log(directory, attempt), sweep_folder(directory) / SUPERVISOR_LOG]
    found = next((log for log in logs if log.exists()), None)
    return "" if found is None else f" See `{found}`."
