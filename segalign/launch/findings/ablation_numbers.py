"""Fill the table of a study from its runs: means, intervals and differences, none left out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from segalign.errors import ConfigError, DataError
from segalign.launch.findings.ablation import AblationCell, AblationRow, AblationRun, AblationTable
from segalign.launch.findings.ablation_notes import (
    reading_notes,
    standing,
    what_numbers_are,
)
from segalign.launch.findings.intervals import mean_interval, paired_difference
from segalign.launch.findings.run_metrics import RunNumbers
from segalign.launch.findings.unknown_names import unknown_metrics
from segalign.launch.plan import Plan, PlannedRun, unique_runs
from segalign.launch.running.observing import ObservedRun
from segalign.launch.running.run_state import FINISHED, RunStatus
from segalign.launch.study import MetricSpec, Study
from segalign.metrics.metric_protocol import check_same_protocol


def make_table(study: Study, plan: Plan, observed: Sequence[ObservedRun]) -> AblationTable:
    """Set out all variants of a study by its metrics.

    Values are those of finished runs. A run that two variants share counts in both. A metric that
    no finished run has leaves a column without numbers, and a line in ``unknown``.

    Args:
        study: The study; its metrics are the columns.
        plan: Its runs.
        observed: Where they stand; those that are not among them have never started.

    Raises:
        ConfigError: If a metric is named twice.
        DataError: If tests of one metric were made by different protocols; it names both runs.
    """
    _refuse_twice([metric.name for metric in study.metrics])
    seen = {one.run.run_id: one for one in observed}
    runs = unique_runs(plan.runs)
    finished = {
        run.run_id: RunNumbers(run.directory)
        for run in runs
        if run.run_id in seen and seen[run.run_id].status in FINISHED
    }
    readings = {metric.name: _read(metric, runs, finished) for metric in study.metrics}
    unknown = unknown_metrics(study, finished.values())
    builder = _Rows(plan, seen, readings, set(unknown))
    rows = [builder.row(label) for label in plan.labels]
    return AblationTable(
        title=f"{study.name}: {what_numbers_are(rows)}",
        metrics=tuple(study.metrics),
        rows=rows,
        base_label=plan.base_label,
        notes=reading_notes(study, plan.base_label, rows),
        unknown=unknown,
    )


class _Readings(dict[str, float]):
    """Values of a metric by run id; in ``errors``, why a run's cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, str] = {}


def _read(
    metric: MetricSpec, runs: Sequence[PlannedRun], finished: Mapping[str, RunNumbers]
) -> _Readings:
    """Read a metric of all finished runs.

    Raises:
        DataError: If two of them were tested by different protocols.
    """
    readings = _Readings()
    protocols: list[tuple[PlannedRun, Mapping[str, Any]]] = []
    for run in (run for run in runs if run.run_id in finished):
        numbers = finished[run.run_id]
        try:
            value = numbers.value(metric)
            protocol = numbers.protocol(metric.name)
        except DataError as error:
            readings.errors[run.run_id] = str(error)
            continue
        if value is not None:
            readings[run.run_id] = value
            protocols.append((run, protocol or {}))
    for other, its_own in protocols[1:]:
        first, expected = protocols[0]
        what = f"`{metric.name}` of `{first.directory}` and `{other.directory}`"
        check_same_protocol(expected, its_own, what)
    return readings


class _Rows:
    """Makes the rows of a table, one at a time."""

    def __init__(
        self,
        plan: Plan,
        seen: Mapping[str, ObservedRun],
        readings: Mapping[str, _Readings],
        unknown: set[str],
    ) -> None:
        self._base_label = plan.base_label
        self._runs: dict[str, list[PlannedRun]] = {}
        for run in plan.runs:
            self._runs.setdefault(run.label, []).append(run)
        self._seen = seen
        self._readings = readings
        self._unknown = unknown
        self._base = {name: self._by_seed(plan.base_label, name) for name in readings}

    def row(self, label: str) -> AblationRow:
        runs = unique_runs(self._runs[label])
        behind = [
            AblationRun(run_id=run.run_id, seed=run.seed, status=self._status(run)) for run in runs
        ]
        standings: dict[str, list[int]] = {}
        for run in runs:
            if text := standing(self._seen.get(run.run_id)):
                standings.setdefault(text, []).append(run.seed)
        return AblationRow(
            label=label,
            cells={name: self._cell(label, name) for name in self._readings},
            num_runs=len(runs),
            num_done=sum(run.status in FINISHED for run in behind),
            missing=_by_seeds(standings),
            runs=behind,
        )

    def _cell(self, label: str, name: str) -> AblationCell:
        by_seed = self._by_seed(label, name)
        values = [value for value in by_seed.values() if math.isfinite(value)]
        is_base = label == self._base_label
        return AblationCell(
            by_seed=by_seed,
            interval=mean_interval(values) if values else None,
            difference=None if is_base else paired_difference(by_seed, self._base[name]),
            notes=() if name in self._unknown else self._cell_notes(label, name),
        )

    def _by_seed(self, label: str, name: str) -> dict[int, float]:
        readings = self._readings[name]
        return {
            run.seed: readings.get(run.run_id, math.nan)
            for run in self._runs.get(label, ())
            if self._status(run) in FINISHED
        }

    def _cell_notes(self, label: str, name: str) -> list[str]:
        readings = self._readings[name]
        seeds: dict[str, list[int]] = {}
        for run in unique_runs(self._runs[label]):
            if self._status(run) not in FINISHED:
                continue
            value = readings.get(run.run_id)
            if run.run_id in readings.errors:
                seeds.setdefault(readings.errors[run.run_id], []).append(run.seed)
            elif value is None:
                seeds.setdefault("not logged", []).append(run.seed)
            elif not math.isfinite(value):
                seeds.setdefault(f"{value}, left out", []).append(run.seed)
        return _by_seeds(seeds)

    def _status(self, run: PlannedRun) -> RunStatus:
        seen = self._seen.get(run.run_id)
        return RunStatus.PENDING if seen is None else seen.status


def _refuse_twice(names: Sequence[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"expected each metric of `metrics` once; got `{twice[0]}` {names.count(twice[0])} "
            "times; leave one"
        )


def _by_seeds(seeds_of: Mapping[str, Sequence[int]]) -> list[str]:
    return [
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: {text}"
        for text, seeds in seeds_of.items()
    ]
