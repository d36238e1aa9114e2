"""Draw common shares, and the two parts of scores as matrices: captions by images."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segalign.rewards.direction_report import PART_NAMES, DirectionReport, matrix_numbers

_MAX_BINS = 40
_BAR, _MEAN, _QUANTILE = "#56789a", "#000000", "#d55e00"
_LINE_TOP = 0.8
_DOTS_PER_INCH = 110


def draw_report(report: DirectionReport, *, num_shown: int = 20) -> bytes:
    """Draw a report.

    Args:
        report: The report.
        num_shown: Pairs of the matrices: the first ones.

    Returns:
        The picture as PNG.
    """
    figure = Figure(figsize=(9.4, 8.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    facts = report.provenance
    use = facts.text.partition(" ")[0]
    figure.suptitle(f"Common direction of {_short(facts.model)} ({use})", fontsize=13)
    axes = figure.subplots(2, 2)
    _draw_shares(axes[0, 0], report)
    places = [axes[0, 1], axes[1, 0], axes[1, 1]]
    shown = {name: part[:num_shown, :num_shown].numpy() for name, part in report.parts.items()}
    # Plain scores and their irrelevant part share a scale; the relevant part lies around 0.
    both = np.stack([shown["plain"], shown["irrelevant"]])
    limit = np.abs(shown["relevant"]).max()
    scales = {
        "plain": {"cmap": "cividis", "vmin": both.min(), "vmax": both.max()},
        "relevant": {"cmap": "PuOr_r", "vmin": -limit, "vmax": limit},
        "irrelevant": {"cmap": "cividis", "vmin": both.min(), "vmax": both.max()},
    }
    for letter, axis, name in zip("bcd", places, PART_NAMES, strict=True):
        drawn = axis.imshow(shown[name], interpolation="nearest", **scales[name])
        _label_matrix(axis, report, name, num_shown, letter)
        figure.colorbar(drawn, ax=axis, shrink=0.85, pad=0.03, label="score")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return content.getvalue()


def _draw_shares(axis: Axes, report: DirectionReport) -> None:
    shares, statistics = report.shares.numpy(), report.statistics
    axis.hist(shares, bins=min(_MAX_BINS, max(5, round(len(shares) ** 0.5))), color=_BAR)
    # The lines end below the legend.
    axis.axvline(statistics.mean, 0, _LINE_TOP, color=_MEAN, label=f"mean {statistics.mean:.3f}")
    label = f"5 % {statistics.low:.3f}, 95 % {statistics.high:.3f}"
    for place, one in ((statistics.low, label), (statistics.high, None)):
        axis.axvline(place, 0, _LINE_TOP, color=_QUANTILE, linestyle="--", label=one)
    axis.margins(x=0.02, y=0.28)
    axis.legend(loc="upper left", fontsize=9, frameon=False)
    axis.set_title(f"(a) common shares of {len(shares):,} captions", fontsize=11)
    axis.set_xlabel("common share (projection on the direction)")
    axis.set_ylabel("captions")
    axis.spines[["top", "right"]].set_visible(False)


def _label_matrix(
    axis: Axes, report: DirectionReport, name: str, num_shown: int, letter: str
) -> None:
    numbers = matrix_numbers(report.parts[name][:num_shown, :num_shown])
    means = f"pairs {numbers.diagonal:+.3f}, others {numbers.off_diagonal:+.3f}"
    axis.set_title(f"({letter}) {PART_NAMES[name]}\n{means}", fontsize=11)
    axis.set_xlabel("image")
    axis.set_ylabel("caption")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"...{name[-57:]}"
