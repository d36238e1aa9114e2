"""Curves of what runs logged over training: the mean of each variant, and what its seeds span."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segalign.launch.findings.ablation import Interval
from segalign.launch.findings.intervals import mean_interval
from segalign.launch.findings.variant_styles import (
    VariantStyle,
    add_key,
    key_height,
    plot_text,
    spread,
)

_MAX_COLUMNS = 2
_INCHES = (5.4, 3.6)
_MIN_BAND = 3  # seeds
_MAX_MARKED = 30  # points of a line that are marked one by one
_SHADE, _FAINT_SHADE = 0.13, 0.05  # of bands, and of many of them
_MAX_SHADED = 6
_NUMBER_GAP = 0.045  # between numbers at the end of lines, of the plot's height


@dataclass(frozen=True)
class VariantCurves:
    """Curves of a variant, by step.

    Attributes:
        finished: Of runs that are finished.
        others: Of runs that are not.
    """

    finished: Sequence[Mapping[int, float]]
    others: Sequence[Mapping[int, float]]

    @property
    def has_band(self) -> bool:
        """Whether there are enough seeds for a band; fewer are drawn one by one."""
        return len(self.finished) >= _MIN_BAND


def draw_curves(
    curves: Mapping[str, Mapping[str, VariantCurves]], styles: Mapping[str, VariantStyle]
) -> Figure:
    """Draw a plot for each name.

    A line is the mean over the seeds of finished runs, at the steps that all of them have; its band
    is the 95 % interval. Fewer than three seeds are thin lines instead, as are runs that are not
    finished.

    Args:
        curves: By name, and by the variant's label.
        styles: Of the variants, by label; at least one.
    """
    columns = min(len(curves), _MAX_COLUMNS)
    rows = math.ceil(len(curves) / columns)
    drawn = [style for label, style in styles.items() if any(label in v for v in curves.values())]
    width = max(_INCHES[0] * columns, 7.0)
    size = (width, _INCHES[1] * rows + key_height(drawn, width))
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, variants) in zip(grid, curves.items(), strict=False):
        _draw(axes, variants, styles)
        axes.set_title(plot_text(name, 60), fontsize=10)
    for axes in grid[len(curves) :]:
        axes.remove()
    add_key(figure, drawn, with_lines=True)
    return figure


def describe_curves(curves: Mapping[str, Mapping[str, VariantCurves]]) -> str:
    """Say what the lines of `draw_curves` are, for those who do not see them."""
    drawn = [one for variants in curves.values() for one in variants.values()]
    if any(one.has_band for one in drawn):
        text = "mean of each variant and its 95 % band over seeds"
        is_whole = all(one.has_band and not one.others for one in drawn)
        return text if is_whole else f"{text}; thin lines are single runs"
    if any(len(one.finished) > 1 for one in drawn):
        return "mean of each variant; thin lines are single runs"
    return "single runs of each variant"


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, Interval]:
    """Return mean and interval at the steps where all curves are finite."""
    if not curves:
        return {}
    steps = set(curves[0]).intersection(*curves[1:])
    return {
        step: mean_interval(values)
        for step in sorted(steps)
        if all(map(math.isfinite, values := [curve[step] for curve in curves]))
    }


def _draw(
    axes: Axes, variants: Mapping[str, VariantCurves], styles: Mapping[str, VariantStyle]
) -> None:
    ends: dict[str, float] = {}
    shade = _SHADE if len(variants) <= _MAX_SHADED else _FAINT_SHADE
    axes.margins(x=0.02)
    for label, style in styles.items():
        if label not in variants:
            continue
        if (end := _draw_variant(axes, variants[label], style, shade)) is not None:
            ends[label] = end
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _number_ends(axes, ends, styles)


def _draw_variant(
    axes: Axes, variant: VariantCurves, style: VariantStyle, shade: float
) -> float | None:
    """Draw a variant, and return the height of its line's end."""
    means = mean_curve(variant.finished)
    thin = [*variant.others, *(() if variant.has_band else variant.finished)]
    for curve in thin:
        axes.plot([*curve], [*curve.values()], style.dash, color=style.colour, lw=0.7, alpha=0.6)
    if not means:
        return None
    heights = [one.mean for one in means.values()]
    marker = "o" if len(means) <= _MAX_MARKED else None
    axes.plot(
        [*means], heights, style.dash, color=style.colour, lw=style.width, marker=marker, ms=3,
        zorder=3 if style.is_base else 2,
    )  # fmt: skip
    if variant.has_band:
        low, high = ([getattr(one, end) for one in means.values()] for end in ("low", "high"))
        axes.fill_between([*means], low, high, color=style.colour, alpha=shade, lw=0)
    return heights[-1]


def _number_ends(axes: Axes, ends: Mapping[str, float], styles: Mapping[str, VariantStyle]) -> None:
    """Write each variant's number at the end of its line, apart from the others."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    places = [(end - bottom) / (top - bottom) for end in ends.values()]
    for label, place, height in zip(ends, places, spread(places, _NUMBER_GAP), strict=True):
        colour = styles[label].colour
        axes.plot(
            [0.985, 1.02], [place, height], color=colour, lw=0.6, transform=axes.transAxes,
            clip_on=False, scalex=False, scaley=False,
        )  # fmt: skip
        axes.annotate(
            str(styles[label].number), (1.025, height), xycoords="axes fraction", fontsize=8,
            color=colour, va="center", annotation_clip=False,
        )  # fmt: skip
