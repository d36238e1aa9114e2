"""Names in a study that no run has numbers of: mistyped, or of what is not logged."""

from collections.abc import Iterable, Sequence
from itertools import chain

from segalign.errors import DataError
from segalign.launch.findings.ablation_notes import unknown_line
from segalign.launch.findings.run_metrics import TEST_PREFIX, RunNumbers
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import FINISHED
from segalign.launch.study import MetricSpec, Study


def unknown_metrics(study: Study, finished: Iterable[RunNumbers]) -> dict[str, str]:
    """Say, by name, which metrics no finished run has, and which near ones they do have.

    Args:
        study: The study.
        finished: Numbers of finished runs; of none, nothing is unknown yet.
    """
    runs = list(finished)
    missing = [one.name for one in study.metrics if not any(_has(run, one) for run in runs)]
    if not runs or not missing:
        return {}
    known = _names(runs)
    return {name: unknown_line(study, name, known) for name in missing}


def unknown_curves(study: Study, observed: Sequence[ObservedRun]) -> dict[str, str]:
    """Say, by name, which of ``plots.curves`` no run has logged though some are finished."""
    runs = [RunNumbers(one.run.directory) for one in observed]
    missing = [
        name for name in study.plots.curves or () if not any(run.curve(name) for run in runs)
    ]
    if not missing or not any(one.status in FINISHED for one in observed):
        return {}
    known = [name for name in _names(runs) if not name.startswith(TEST_PREFIX)]
    return {name: unknown_line(study, name, known, key="plots.curves") for name in missing}


def unknown_now(study: Study, observed: Sequence[ObservedRun]) -> list[str]:
    """List a line for each metric that no run has which is finished by now."""
    finished = [RunNumbers(one.run.directory) for one in observed if one.status in FINISHED]
    return list(unknown_metrics(study, finished).values())


def first_of(lines: Sequence[str]) -> str:
    """Return the first line, and say on it how many there are besides."""
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _has(run: RunNumbers, metric: MetricSpec) -> bool:
    try:
        return run.value(metric) is not None
    except DataError:  # it has a result, which cannot be read
        return True


def _names(runs: Sequence[RunNumbers]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(map(_names_of, runs))))


def _names_of(run: RunNumbers) -> list[str]:
    try:
        return run.names()
    except DataError:  # the cells of another metric say so
        return []
