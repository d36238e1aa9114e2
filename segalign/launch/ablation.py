"""The table of a study: variants by metrics, with what chance makes of the numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """A variant.

    Attributes:
        label: Its label.
        cells: By the metric's name.
        num_runs: Runs planned.
        num_done: Runs finished.
        missing: Runs that are not, as people read them: ``seed 1: failed (exit 70): ...``.
    """

    label: str
    cells: Mapping[str, AblationCell]
    num_runs: int
    num_done: int
    missing: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class AblationTable:
    """A study's table.

    Attributes:
        title: The study's name, and what the numbers are.
        metrics: Columns.
        rows: Variants, in the order of the plan, none left out.
        base_label: The variant that differences are to.
        notes: What readers must know.
    """

    title: str
    metrics: Sequence[MetricSpec]
    rows: Sequence[AblationRow]
    base_label: str
    notes: Sequence[str] = field(default_factory=tuple)
