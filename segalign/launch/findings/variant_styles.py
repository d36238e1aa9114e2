"""How plots of a study show its variants: a number, a colour and a dash each, the same in all."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from segalign.launch.findings.ablation import AblationRow, AblationTable
from segalign.launch.study import MetricSpec

Dash = Literal["-", "--", ":"]

ONE_COLOUR: Final = "#1f5fa8"
REST_COLOUR: Final = "#6b6b6b"
MAX_SHOWN: Final = 12
ARROWS: Final = {"max": "↑", "min": "↓"}
# Apart for those who do not see red and green apart, and on paper; the base is nearly black.
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: Final[tuple[Dash, ...]] = ("-", "--", ":")
_BASE_COLOUR: Final = "#222222"
_LINE_LENGTH: Final = 38
_MAX_LINES: Final = 3
# Of an entry of the key, and of a line of it, in inches.
_ENTRY_WIDTH: Final = 3.4
_LINE_HEIGHT: Final = 0.135
_ENTRY_GAP: Final = 0.06


@dataclass(frozen=True, kw_only=True)
class VariantStyle:
    """How a variant is shown.

    Attributes:
        label: Its label, as plots write it.
        number: What marks it in plots, from 1.
        colour: Of its lines and points.
        dash: Of its lines.
        is_base: Whether others are compared with it.
    """

    label: str
    number: int
    colour: str
    dash: Dash
    is_base: bool

    @property
    def width(self) -> float:
        """Of its lines, in points."""
        return 2.2 if self.is_base else 1.6


def variant_styles(table: AblationTable) -> dict[str, VariantStyle]:
    """Give each variant that is shown its style, by label.

    All variants of a study with at most 12; else the base and the best by the first metric.
    """
    others = iter([(colour, dash) for dash in _DASHES for colour in _COLOURS])
    styles = {}
    for number, label in enumerate(_shown(table), 1):
        is_base = label == table.base_label
        colour, dash = (_BASE_COLOUR, _DASHES[0]) if is_base else next(others)
        styles[label] = VariantStyle(
            label=plot_text(f"{label} (base)" if is_base else label),
            number=number,
            colour=colour,
            dash=dash,
            is_base=is_base,
        )
    return styles


def heading(metric: MetricSpec) -> str:
    """Name a metric in a plot, with an arrow to the better side."""
    return f"{plot_text(metric.label)} {ARROWS[metric.mode]}"


def plot_text(text: str, width: int = _LINE_LENGTH) -> str:
    """Break a text into a few lines; what is left is cut, and no sign starts a formula."""
    lines = textwrap.wrap(text, width)
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], f"{lines[_MAX_LINES - 1][: width - 3]}..."]
    return "\n".join(lines).replace("$", r"\$")


def add_key(figure: Figure, styles: Sequence[VariantStyle], *, with_lines: bool) -> None:
    """Write below a figure which number and colour is which variant."""
    handles = [
        Line2D(
            [], [], color=one.colour, linestyle=one.dash if with_lines else "none",
            linewidth=one.width, marker=None if with_lines else "o", markersize=8,
        )
        for one in styles
    ]  # fmt: skip
    labels = [f"{one.number}  {one.label}" for one in styles]
    columns = _key_columns(len(styles), figure.get_figwidth())
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False,
        handlelength=2.6,
    )  # fmt: skip


def key_height(styles: Sequence[VariantStyle], width: float) -> float:
    """Return about how high the key is below a figure of a width, both in inches."""
    columns = _key_columns(len(styles), width)
    rows = math.ceil(len(styles) / columns)
    lines = [one.label.count("\n") + 1 for one in styles]
    highest = max(sum(lines[start : start + rows]) for start in range(0, len(lines), rows))
    return _LINE_HEIGHT * highest + _ENTRY_GAP * rows


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Push places in [0, 1] apart until neighbours are a gap away, about where they were.

    Their order stays; they stay in [0, 1] if there is room for all.

    Reference: pooling of adjacent violators, for places less their rank times the gap.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([places[index] - rank * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    room = max(1 - (len(places) - 1) * gap, 0.0)
    moved = [min(max(_mean(pool), 0.0), room) for pool in pools for _ in pool]
    result = [0.0] * len(places)
    for rank, index in enumerate(order):
        result[index] = moved[rank] + rank * gap
    return result


def _key_columns(num_entries: int, width: float) -> int:
    return max(1, min(num_entries, int(width / _ENTRY_WIDTH)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shown(table: AblationTable) -> list[str]:
    labels = [row.label for row in table.rows]
    if len(labels) <= MAX_SHOWN or not table.metrics:
        return labels[:MAX_SHOWN]
    metric = table.metrics[0]
    best = sorted(table.rows, key=lambda row: _rank(row, metric))
    others = [row.label for row in best if row.label != table.base_label]
    kept = {table.base_label, *others[: MAX_SHOWN - 1]}
    return [label for label in labels if label in kept]


def _rank(row: AblationRow, metric: MetricSpec) -> float:
    """Return what sorts the best to the front, and those without a number to the end."""
    found = row.cells[metric.name].interval
    if found is None:
        return math.inf
    return -found.mean if metric.mode == "max" else found.mean
