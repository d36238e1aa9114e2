"""Plots of what variants and axes do: main effects, and differences to the base."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segalign.launch.findings.ablation import AblationTable, Interval
from segalign.launch.findings.main_effects import MainEffect
from segalign.launch.findings.variant_styles import (
    ONE_COLOUR,
    REST_COLOUR,
    VariantStyle,
    heading,
    plot_text,
)
from segalign.launch.study import MetricSpec

_MAX_COLUMNS = 3
_PANEL = (3.6, 2.9)
_ROW_HEIGHT = 0.36  # of a variant among differences, inches
_LEVEL_LENGTH = 14


def draw_main_effects(
    effects: Mapping[str, Mapping[str, MainEffect]], metrics: Sequence[MetricSpec]
) -> Figure:
    """Draw the mean at each level with its interval: a row for each metric, a column for each axis.

    With one axis alone, metrics stand side by side instead.

    Args:
        effects: By the metric's name, and by the axis's label; the same axes for all metrics, but
            for those that there is nothing of.
        metrics: Those to draw.
    """
    axis_labels = list(dict.fromkeys(label for one in effects.values() for label in one))
    if len(axis_labels) == 1:
        return _draw_one_axis(effects, metrics, axis_labels[0])
    size = (max(_PANEL[0] * len(axis_labels), 5.0), _PANEL[1] * len(metrics))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(metrics), len(axis_labels), squeeze=False, sharey="row")
    for row, metric in zip(grid, metrics, strict=True):
        for axes, label in zip(row, axis_labels, strict=True):
            if (effect := effects[metric.name].get(label)) is not None:
                _draw_effect(axes, effect, label)
            else:
                axes.set_axis_off()
        row[0].set_ylabel(heading(metric), fontsize=9)
    return figure


def _draw_one_axis(
    effects: Mapping[str, Mapping[str, MainEffect]], metrics: Sequence[MetricSpec], label: str
) -> Figure:
    columns = min(len(metrics), _MAX_COLUMNS)
    rows = -(-len(metrics) // columns)
    size = (max(_PANEL[0] * columns, 5.0), _PANEL[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, metric in zip_longest(panels, metrics):
        effect = None if metric is None else effects[metric.name].get(label)
        if metric is None or effect is None:
            axes.set_axis_off()
        else:
            _draw_effect(axes, effect, label)
            axes.set_ylabel(heading(metric), fontsize=9)
    return figure


def draw_differences(
    table: AblationTable, metrics: Sequence[MetricSpec], styles: Mapping[str, VariantStyle]
) -> Figure:
    """Draw each variant's difference to the base with its interval, a plot for each metric.

    A full point has an interval that excludes zero.

    Args:
        table: The numbers.
        metrics: Those to draw.
        styles: Of the variants to draw, by label.
    """
    rows = [row for row in table.rows if row.label in styles and row.label != table.base_label]
    columns = min(len(metrics), _MAX_COLUMNS)
    lines = math.ceil(len(metrics) / columns)
    size = (2.6 + 3.0 * columns, (1.1 + _ROW_HEIGHT * len(rows)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    names = [f"{styles[row.label].number}  {plot_text(row.label)}" for row in rows]
    for axes, metric in zip(panels.flat, metrics, strict=False):
        _draw_differences(axes, [row.cells[metric.name].difference for row in rows])
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set_title(heading(metric), fontsize=10)
    panels[0][0].invert_yaxis()
    for axes in list(panels.flat)[len(metrics) :]:
        axes.remove()
    base = plot_text(table.base_label, 80)
    figure.supxlabel(f"difference to {base}, paired by seed, 95 % interval", fontsize=9)
    return figure


def draw_samples(
    samples: Mapping[str, Sequence[tuple[float, float]]], metric: MetricSpec, on_log: set[str]
) -> Figure:
    """Draw a metric of single runs over what a searcher drew, a plot for each axis.

    Args:
        samples: Drawn numbers and the metric, by the axis's label.
        metric: The metric.
        on_log: Axes that are logarithmic.
    """
    columns = min(len(samples), _MAX_COLUMNS)
    lines = math.ceil(len(samples) / columns)
    size = (max(_PANEL[0] * columns, 5.0), _PANEL[1] * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (label, points) in zip(panels.flat, samples.items(), strict=False):
        axes.plot(*zip(*points, strict=True), "o", color=ONE_COLOUR, ms=5, alpha=0.7)
        axes.set_xscale("log" if label in on_log else "linear")
        axes.set_xlabel(plot_text(label), fontsize=9)
        axes.tick_params(labelsize=8)
        _clean(axes, "y")
    for axes in list(panels.flat)[len(samples) :]:
        axes.remove()
    panels[0][0].set_ylabel(heading(metric), fontsize=9)
    return figure


def _draw_effect(axes: Axes, effect: MainEffect, label: str) -> None:
    places = range(len(effect.levels))
    for place, found in zip(places, effect.levels.values(), strict=True):
        half = found.half if found.is_known else None
        axes.errorbar(place, found.mean, yerr=half, color=ONE_COLOUR, marker="o", ms=5, capsize=3)
    means = [found.mean for found in effect.levels.values()]
    axes.plot(places, means, color=ONE_COLOUR, lw=1, alpha=0.5)
    names = [plot_text(level, _LEVEL_LENGTH) for level in effect.levels]
    is_long = max(map(len, names)) * len(names) > 4 * _LEVEL_LENGTH
    axes.set_xticks(places, names)
    if is_long:
        for name in axes.get_xticklabels():
            name.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.tick_params(labelsize=8)
    axes.set_xlim(-0.4, len(names) - 0.6)
    axes.set_xlabel(f"{plot_text(label)}{_over(effect)}", fontsize=9)
    _clean(axes, "y")


def _over(effect: MainEffect) -> str:
    """Say what a mean is over, where it is not plain."""
    if effect.num_left_out:
        num_all = effect.num_blocks + effect.num_left_out
        return f"\n(over {effect.num_blocks} of {num_all} combinations of the rest)"
    return (
        "" if effect.num_blocks == 1 else f"\n(over {effect.num_blocks} combinations of the rest)"
    )


def _draw_differences(axes: Axes, differences: Sequence[Interval | None]) -> None:
    axes.axvline(0, color=REST_COLOUR, lw=1, ls=":")
    for place, found in enumerate(differences):
        if found is None:
            axes.annotate(
                "no number", (0.5, place), xycoords=("axes fraction", "data"), fontsize=7,
                color=REST_COLOUR, ha="center", va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
            continue
        axes.errorbar(
            found.mean, place, xerr=found.half if found.is_known else None, color=ONE_COLOUR,
            marker="o", ms=6, mfc=ONE_COLOUR if found.excludes_zero else "white", capsize=3,
        )  # fmt: skip
    axes.set_ylim(-0.6, len(differences) - 0.4)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    _clean(axes, "x")


def _clean(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
