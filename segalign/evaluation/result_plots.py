"""Pictures of scores by the length of the caption, and by the number of the segment."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from segalign.metrics.pair_buckets import LENGTHS, SEGMENT_GROUPS, SEGMENT_KEYS
from segalign.metrics.score_groups import by_length, by_position, mean, offsets

PerImage = Mapping[str, Sequence[Any]]

_MAX_COLUMNS: Final = 3
_INCHES: Final = (3.7, 3.0)
_DPI: Final = 130
_LINE, _REST = "#1f5fa8", "#6b6b6b"
_SHOWN_LENGTHS: Final = ("≤ 77", "78-154", "155-308", "> 308")
_KINDS: Final = {"reward": "{}", "denscore_o": "Denscore-O of {}"}


def draw_lengths(per_image: PerImage) -> Figure | None:
    """Draw the mean of every reward by the length of the caption.

    Args:
        per_image: What `segalign.metrics.alignment.Alignment` says of each image.

    Returns:
        A small plot for each reward, with intervals of 95 % and the number of images; None if there
        is no reward.
    """
    scores = {name: per_image[name] for name in per_image if _title(name)}
    if not scores:
        return None
    figure, grid = _grid(len(scores))
    labels = dict(zip(LENGTHS, _SHOWN_LENGTHS, strict=True))
    for axes, (name, found) in zip(grid, scores.items(), strict=False):
        groups = by_length(per_image["num_tokens"], found)
        _draw(axes, {labels[one]: values for one, values in groups.items()})
        every = [value for values in groups.values() for value in values]
        if every:
            axes.axhline(mean(every), color=_REST, linestyle=":", linewidth=1)
        axes.set_title(_title(name), fontsize=10)
    figure.supxlabel("tokens of the caption (number of images); dotted: mean of all", fontsize=9)
    figure.supylabel("mean score, 95 % interval", fontsize=9)
    return figure


def draw_segments(per_image: PerImage) -> Figure | None:
    """Draw how segments score by their number in the caption, plain and against their caption.

    Args:
        per_image: See `draw_lengths`.

    Returns:
        Two small plots for each reward that scores segments; None if there is none.
    """
    scores = {n.partition("/")[2]: per_image[n] for n in per_image if n.startswith("segment_score")}
    if not scores:
        return None
    figure = Figure(figsize=(2 * _INCHES[0], _INCHES[1] * len(scores) + 0.3), layout="constrained")
    grid = figure.subplots(len(scores), 2, squeeze=False)
    labels = dict(zip(SEGMENT_KEYS, SEGMENT_GROUPS, strict=True))
    for (left, right), (name, found) in zip(grid, scores.items(), strict=True):
        for axes, rows in ((left, found), (right, offsets(found))):
            groups = by_position(rows)
            _draw(axes, {labels[one]: values for one, values in groups.items()})
        right.axhline(0, color=_REST, linestyle=":", linewidth=1)
        left.set_title(f"{name}: score of the segment", fontsize=10)
        right.set_title(f"{name}: minus its caption's mean", fontsize=10)
    figure.supxlabel("number of the segment in the caption (how many segments)", fontsize=9)
    figure.supylabel("mean, 95 % interval", fontsize=9)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG, the same bytes each time."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()


def _title(name: str) -> str:
    """Call a score by its reward; nothing if it is a part of one, or no score."""
    kind, _, reward = name.partition("/")
    return _KINDS[kind].format(reward) if kind in _KINDS and "/" not in reward else ""


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, _MAX_COLUMNS)
    rows = math.ceil(count / columns)
    size = (max(_INCHES[0] * columns, 5), _INCHES[1] * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _draw(axes: Axes, groups: Mapping[str, Sequence[float]]) -> None:
    """Draw means with intervals, and write under each how many there are."""
    places = range(len(groups))
    means = [mean(values) for values in groups.values()]
    bars = [_interval(values) for values in groups.values()]
    axes.errorbar(places, means, yerr=bars, color=_LINE, marker="o", markersize=5, capsize=3)
    axes.set_xticks(places, [f"{name}\n({len(values)})" for name, values in groups.items()])
    axes.tick_params(labelsize=8)
    axes.set_xlim(-0.5, max(len(groups), 1) - 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean; nothing of a single value."""
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
