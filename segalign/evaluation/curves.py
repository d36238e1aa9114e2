"""Curves of what evaluations have found over a run: one small plot for each value."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segalign.atomic import write_bytes_atomic

_COLUMNS = 3
_INCHES = (3.6, 2.5)
_DPI = 120


def draw_curves(history: Mapping[int, Mapping[str, float]], names: Sequence[str]) -> Figure:
    """Plot values over steps.

    Args:
        history: Values by name, by step.
        names: Which of them, one plot each.
    """
    columns = min(len(names), _COLUMNS)
    rows = math.ceil(len(names) / columns)
    size = (_INCHES[0] * columns, _INCHES[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        _draw(axes, name, history)
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    return figure


def write_curves(
    history: Mapping[int, Mapping[str, float]], names: Sequence[str], path: Path
) -> None:
    """Write the plots as a PNG, whole or not at all."""
    picture = io.BytesIO()
    draw_curves(history, names).savefig(picture, format="png", dpi=_DPI)
    write_bytes_atomic(path, picture.getvalue())


def _draw(axes: Axes, name: str, history: Mapping[int, Mapping[str, float]]) -> None:
    steps = [step for step, values in history.items() if name in values]
    axes.plot(steps, [history[step][name] for step in steps], marker="o", markersize=3)
    axes.set_title(name, fontsize=9)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(alpha=0.3)
