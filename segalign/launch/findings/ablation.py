"""The table of a study: variants by metrics, with what chance makes of the numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from segalign.launch.running.run_state import RunStatus
from segalign.launch.study import MetricSpec


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: Mean.
        low: Lower end; NaN of fewer than two values, as is ``high``.
        high: Upper end.
        num: Values.
    """

    mean: float
    low: float
    high: float
    num: int

    @property
    def is_known(self) -> bool:
        """Whether there are ends, which a single value has not."""
        return math.isfinite(self.low)

    @property
    def half(self) -> float:
        """Half of its width; NaN if it is not known."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it is on one side of zero; never if it is not known."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class AblationCell:
    """A variant's numbers for one metric.

    Attributes:
        by_seed: Values of finished runs; NaN where a run did not log the metric.
        interval: Over the seeds; None if there is no value.
        difference: To the base variant, over the seeds that both have; None of the base itself, and
            where there is none.
    """

    by_seed: Mapping[int, float]
    interval: Interval | None
    difference: Interval | None
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """A run behind a row.

    Attributes:
        run_id: Its id; the same as another row's where two variants have the same config.
        seed: Its seed.
        status: Where it stands.
    """

    run_id: str
    seed: int
    status: RunStatus


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """A variant.

    Attributes:
        label: Its label.
        cells: By the metric's name.
        num_runs: Runs planned.
        num_done: Runs finished.
        missing: Runs that are not, as people read them: ``seed 1: failed (exit 70): ...``.
        runs: All of them, in the order of the plan.
    """

    label: str
    cells: Mapping[str, AblationCell]
    num_runs: int
    num_done: int
    missing: Sequence[str] = field(default_factory=tuple)
    runs: Sequence[AblationRun] = field(default_factory=tuple)

    @property
    def num_failed(self) -> int:
        """Runs that have failed."""
        return sum(run.status is RunStatus.FAILED for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class AblationTable:
    """A study's table.

    Attributes:
        title: The study's name, and what the numbers are.
        metrics: Columns.
        rows: Variants, in the order of the plan, none left out.
        base_label: The variant that differences are to.
        notes: What readers must know.
        unknown: Metrics that no finished run has, each with a line that says so and names near
            ones; empty as long as no run is finished.
    """

    title: str
    metrics: Sequence[MetricSpec]
    rows: Sequence[AblationRow]
    base_label: str
    notes: Sequence[str] = field(default_factory=tuple)
    unknown: Mapping[str, str] = field(default_factory=dict)
