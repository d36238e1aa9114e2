"""What stands around the numbers of a study's table, in words."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Final

from segalign.launch.findings.ablation import AblationRow
from segalign.launch.findings.run_metrics import TEST_PREFIX
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import FINISHED, RunStatus
from segalign.launch.study import Study

_NUM_NEAR: Final = 3
_MAX_COMPARED: Final = 5
# How a run that is not finished reads in a footnote.
_STANDINGS: Final[Mapping[RunStatus, str]] = {
    RunStatus.PENDING: "not started",
    RunStatus.QUEUED: "waits in the queue",
    RunStatus.RUNNING: "still running",
    RunStatus.PREEMPTED: "stopped by a signal, can be resumed",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELLED: "cancelled",
    RunStatus.DEAD: "died, can be resumed",
    RunStatus.PRUNED: "pruned; its last values count",
}


def standing(seen: ObservedRun | None) -> str:
    """Say why a run's numbers are missing; nothing if they are not."""
    if seen is None:
        return _STANDINGS[RunStatus.PENDING]
    status = seen.status
    text = _STANDINGS.get(status, "")
    if status is RunStatus.RUNNING and seen.step is not None:
        return f"{text}, step {seen.step}" + (f" of {seen.max_steps}" if seen.max_steps else "")
    if status is RunStatus.FAILED and seen.state is not None:
        code = "" if seen.state.exit_code is None else f" (exit {seen.state.exit_code})"
        reason = f": {seen.state.reason}" if seen.state.reason else ""
        return f"{text}{code}{reason}"
    return text


def unknown_line(study: Study, name: str, known: Sequence[str], key: str = "metrics") -> str:
    """Say that no finished run has a metric, and what comes near.

    Args:
        study: The study.
        name: The metric's.
        known: Names that finished runs have numbers of.
        key: Part of the study that names it.
    """
    is_curve = key != "metrics"
    if name in known and not is_curve:
        got = f"it is logged, but not at `{_at(study, name)}`"
        cure = "choose another `at`, or set `checkpoint.monitor`"
    else:
        near = get_close_matches(name, known, _NUM_NEAR) or sorted(known)[:_NUM_NEAR]
        names = ", ".join(f"`{one}`" for one in near)
        got = f"near it are {names}" if near else "they log nothing"
        cure = f"correct `{key}`"
    if name.startswith(TEST_PREFIX) and is_curve:
        cure = "curves are of training: name `train/...` or `val/...`"
    elif name.startswith(TEST_PREFIX) and "test" not in study.stages:
        cure = "add `test` to `stages`"
    return (
        f"expected a metric that runs of `{study.name}` log; no finished run has `{name}`: {got}; "
        f"{cure}"
    )


def _at(study: Study, name: str) -> str | int:
    return next(metric.at for metric in study.metrics if metric.name == name)


def _num_seeds(rows: Sequence[AblationRow]) -> int:
    return max((len({run.seed for run in row.runs}) for row in rows), default=0)


def what_numbers_are(rows: Sequence[AblationRow]) -> str:
    """Say what the numbers of a table's cells are."""
    return "mean ± half of its 95 % interval" if _num_seeds(rows) > 1 else "values of one seed"


def reading_notes(study: Study, base_label: str, rows: Sequence[AblationRow]) -> list[str]:
    """Say how the numbers were made, and what they do not say."""
    num_seeds = _num_seeds(rows)
    notes = []
    if num_seeds > 1:
        text = f"95 % intervals over {num_seeds} paired seeds, Student's t"
        if len(rows) > _MAX_COMPARED:
            text += "; not corrected for several comparisons"
        notes.append(f"{text}.")
    else:
        notes.append("One seed for each variant: what chance does is not known.")
    if len(rows) > 1 and any(row.label == base_label for row in rows):
        star = "; * where its interval excludes zero" if num_seeds > 1 else ""
        notes.append(f"In parentheses: difference to {base_label}, seed by seed{star}.")
    places = {"best": "the best checkpoint's step"}
    notes += [
        f"{metric.label}: at {places.get(str(metric.at), f'step {metric.at}')}."
        for metric in study.metrics
        if metric.at != "last" and not metric.name.startswith(TEST_PREFIX)
    ]
    statuses = {run.run_id: run.status for row in rows for run in row.runs}
    num_open = sum(status not in FINISHED for status in statuses.values())
    if num_open:
        notes.append(f"{num_open} of {len(statuses)} runs are not finished.")
    return notes
