"""One metric against another: each variant's means, and which of them none beats in both."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from segalign.launch.findings.ablation import AblationTable, Interval
from segalign.launch.findings.variant_styles import (
    REST_COLOUR,
    VariantStyle,
    add_key,
    heading,
    key_height,
)
from segalign.launch.study import MetricSpec

_INCHES = (7.0, 4.6)


def draw_pareto(
    table: AblationTable, pair: tuple[MetricSpec, MetricSpec], styles: Mapping[str, VariantStyle]
) -> Figure:
    """Draw a metric against another, with intervals, and a line through the front.

    Args:
        table: The numbers; variants without one of the two are not drawn.
        pair: Metrics of x and y.
        styles: Of the variants that are numbered, by label; others are grey.
    """
    points = pareto_points(table, pair)
    shown = [style for label, style in styles.items() if label in points]
    size = (_INCHES[0], _INCHES[1] + key_height(shown, _INCHES[0]))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    front = [points[label] for label in pareto_front(points, pair)]
    line = [[one.mean for one in axis] for axis in zip(*front, strict=True)]
    axes.plot(*line, color=REST_COLOUR, lw=1.2, ls="--", zorder=1)
    for label, (x, y) in points.items():
        style = styles.get(label)
        colour = "#c0c0c0" if style is None else style.colour
        bars = [one.half if one.is_known else None for one in (x, y)]
        axes.errorbar(
            x.mean, y.mean, xerr=bars[0], yerr=bars[1], color=colour, lw=1, capsize=2, alpha=0.45,
            zorder=2,
        )  # fmt: skip
        axes.plot(x.mean, y.mean, "o", color=colour, ms=4 if style is None else 12, zorder=3)
        if style is not None:
            axes.annotate(
                str(style.number), (x.mean, y.mean), color="white", fontsize=8, weight="bold",
                ha="center", va="center_baseline", zorder=4,
            )  # fmt: skip
    axes.set_xlabel(heading(pair[0]), fontsize=10)
    axes.set_ylabel(heading(pair[1]), fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    axes.spines[["top", "right"]].set_visible(False)
    add_key(figure, shown, with_lines=False)
    return figure


def pareto_points(
    table: AblationTable, pair: tuple[MetricSpec, MetricSpec]
) -> dict[str, tuple[Interval, Interval]]:
    """Return both metrics of the variants that have them, by label."""
    points = {}
    for row in table.rows:
        x, y = (row.cells[metric.name].interval for metric in pair)
        if x is not None and y is not None:
            points[row.label] = (x, y)
    return points


def pareto_front(
    points: Mapping[str, tuple[Interval, Interval]], pair: Sequence[MetricSpec]
) -> list[str]:
    """List the variants that no other one beats, by x: better in one mean, not worse in the other.

    It is of the means alone: chance may have moved them.
    """
    signs = [1 if metric.mode == "max" else -1 for metric in pair]
    goods = {
        label: tuple(sign * one.mean for sign, one in zip(signs, both, strict=True))
        for label, both in points.items()
    }
    front = [
        label
        for label, good in goods.items()
        if not any(
            other != good and all(a >= b for a, b in zip(other, good, strict=True))
            for other in goods.values()
        )
    ]
    return sorted(front, key=lambda label: points[label][0].mean)
