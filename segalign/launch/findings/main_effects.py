"""What one axis of a study does on its own: a metric's mean at each level, over all else."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from segalign.launch.findings.ablation import AblationTable, Interval
from segalign.launch.findings.intervals import mean_interval
from segalign.launch.plan import Plan

ARM_AXIS = "arm"

# Arm and levels of a variant, by axis.
Point = Mapping[str, str]
_Block = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MainEffect:
    """The effect of one axis.

    Attributes:
        levels: Mean over everything else at each level, and its interval over seeds.
        num_blocks: Combinations of everything else that the means are over.
        num_left_out: Combinations without a number at some level and seed.
    """

    levels: Mapping[str, Interval]
    num_blocks: int
    num_left_out: int


def main_effect(plan: Plan, table: AblationTable, metric: str, axis: str) -> MainEffect | None:
    """Average a metric over all but one axis.

    Only combinations of everything else that have a number at every level and seed count, so that
    levels are compared like with like; levels and seeds that have none at all yet are left out. The
    interval is over seeds, each an average of its own.

    Args:
        plan: The runs.
        table: Their numbers.
        metric: Name of the metric.
        axis: Label of the axis, or ``arm``.

    Returns:
        The effect; None if there is no such combination, or but one level.
    """
    values = _values(plan, table, metric, axis)
    finite = {key for key, value in values.items() if math.isfinite(value)}
    levels = list(dict.fromkeys(level for level, _, _ in values if _has(finite, 0, level)))
    seeds = list(dict.fromkeys(seed for _, _, seed in values if _has(finite, 2, seed)))
    blocks = list(dict.fromkeys(block for _, block, _ in values))
    whole = [
        block
        for block in blocks
        if all((level, block, seed) in finite for level in levels for seed in seeds)
    ]
    if len(levels) < 2 or not whole:
        return None
    means = {
        level: mean_interval(
            [statistics.fmean(values[level, block, seed] for block in whole) for seed in seeds]
        )
        for level in levels
    }
    return MainEffect(means, len(whole), len(blocks) - len(whole))


def points_of(plan: Plan) -> dict[str, Point]:
    """Return arm and levels of each variant, by its label."""
    return {run.label: {ARM_AXIS: run.arm, **run.levels} for run in plan.runs}


def _has(keys: Iterable[tuple[object, ...]], place: int, part: object) -> bool:
    return any(key[place] == part for key in keys)


def _values(
    plan: Plan, table: AblationTable, metric: str, axis: str
) -> dict[tuple[str, _Block, int], float]:
    """Return a metric's values by level, everything else, and seed; NaN of missing runs."""
    points = points_of(plan)
    values = {}
    for row in table.rows:
        point = points[row.label]
        if axis not in point:
            continue
        block = tuple(sorted(item for item in point.items() if item[0] != axis))
        for run in row.runs:
            found = row.cells[metric].by_seed.get(run.seed, math.nan)
            values[point[axis], block, run.seed] = found
    return values
