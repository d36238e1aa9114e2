"""The table of a study as text that every format shares: rounded numbers, marks and footnotes."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from segalign.launch.findings.ablation import AblationCell, AblationRow, AblationTable, Interval
from segalign.launch.study import MetricSpec

_MAX_DECIMALS: Final = 8
_WIDTH_DIGITS: Final = 2  # significant ones of an interval's half
_PLAIN_DIGITS: Final = 4  # of a number without an interval
_MAX_FOOTNOTE: Final = 240


@dataclass(frozen=True, kw_only=True)
class Amount:
    """A rounded mean.

    Attributes:
        mean: The mean; differences have a sign.
        half: Half of its interval; None if that is not known.
        count: Values behind it where that is not what readers expect; else None.
    """

    mean: str
    half: str | None
    count: int | None


@dataclass(frozen=True, kw_only=True)
class CellText:
    """A cell.

    Attributes:
        amount: Its number; None shows what is there instead.
        difference: To the base; None where there is none.
        is_clear: Whether the difference's interval excludes zero.
        is_better: Whether the difference is to the better side.
        marks: Numbers of footnotes.
        absent: What is shown where there is no number: a dash, or how all of its runs stand.
    """

    amount: Amount | None
    difference: Amount | None = None
    is_clear: bool = False
    is_better: bool = False
    marks: tuple[int, ...] = ()
    absent: str = "-"


@dataclass(frozen=True, kw_only=True)
class RowText:
    """A variant.

    Attributes:
        label: Its label.
        is_base: Whether differences are to it.
        runs: Finished and planned runs, ``2/3``, and how many have failed.
        cells: As many as there are metrics.
        marks: Numbers of footnotes.
    """

    label: str
    is_base: bool
    runs: str
    cells: Sequence[CellText]
    marks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TableText:
    """A table.

    Attributes:
        title: What the numbers are.
        metrics: Columns.
        marks: Numbers of footnotes of each column's heading.
        rows: Variants.
        notes: Sentences under the table.
        footnotes: What the marks mean; the first has the number 1.
    """

    title: str
    metrics: Sequence[MetricSpec]
    marks: Sequence[tuple[int, ...]]
    rows: Sequence[RowText]
    notes: Sequence[str]
    footnotes: Sequence[str]


def table_text(table: AblationTable) -> TableText:
    """Round the numbers of a table, each column alike, and number its footnotes."""
    footnotes = _Footnotes()
    marks = [
        footnotes.add([table.unknown[metric.name]] if metric.name in table.unknown else [])
        for metric in table.metrics
    ]
    decimals = {metric.name: column_decimals(table, metric.name) for metric in table.metrics}
    rows = []
    for row in table.rows:
        own_marks = footnotes.add([f"{row.label}: {'; '.join(row.missing)}"] if row.missing else [])
        cells = [_cell(row, metric, decimals[metric.name], footnotes) for metric in table.metrics]
        rows.append(
            RowText(
                label=row.label,
                is_base=row.label == table.base_label,
                runs=_runs(row),
                cells=cells,
                marks=own_marks,
            )
        )
    return TableText(
        title=table.title,
        metrics=table.metrics,
        marks=marks,
        rows=rows,
        notes=table.notes,
        footnotes=footnotes.texts,
    )


def column_decimals(table: AblationTable, name: str) -> int:
    """Return how many decimals a metric's numbers are worth.

    Two significant digits of the median of the intervals' halves, and one of the smallest if that
    takes no more than two decimals more; where there is no interval, four significant digits of the
    largest number.
    """
    cells = [row.cells[name] for row in table.rows]
    found = [one for cell in cells for one in (cell.interval, cell.difference) if one is not None]
    halves = [one.half for one in found if one.is_known and one.half > 0]
    sizes = [abs(one.mean) for one in found if math.isfinite(one.mean) and one.mean]
    if halves:
        usual = _decimals(statistics.median(halves), _WIDTH_DIGITS)
        return min(max(usual, min(_decimals(min(halves), 1), usual + 2)), _MAX_DECIMALS)
    return _decimals(max(sizes), _PLAIN_DIGITS) if sizes else 0


def _decimals(size: float, digits: int) -> int:
    """Return the decimals that so many significant digits of a size need."""
    return min(max(digits - 1 - math.floor(math.log10(size)), 0), _MAX_DECIMALS)


class _Footnotes:
    """Numbers footnotes in the order of their marks."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, texts: Sequence[str]) -> tuple[int, ...]:
        first = len(self.texts) + 1
        self.texts += map(_shorten, texts)
        return tuple(range(first, len(self.texts) + 1))


def _cell(row: AblationRow, metric: MetricSpec, decimals: int, footnotes: _Footnotes) -> CellText:
    cell = row.cells[metric.name]
    notes = [f"{row.label}, {metric.label}: {note}" for note in cell.notes]
    marks = footnotes.add(notes)
    if cell.interval is None:
        return CellText(amount=None, marks=marks, absent=_absent(row))
    count = cell.interval.num if cell.interval.num != row.num_runs else None
    return CellText(
        amount=_amount(cell.interval, decimals, count),
        marks=marks,
        **_difference(cell, cell.interval, metric, decimals),
    )


def _runs(row: AblationRow) -> str:
    failed = f", {row.num_failed} failed" if row.num_failed else ""
    return f"{row.num_done}/{row.num_runs}{failed}"


def _absent(row: AblationRow) -> str:
    """Say how runs stand of which none is finished; a dash where they differ."""
    standings = {str(run.status) for run in row.runs}
    return standings.pop() if not row.num_done and len(standings) == 1 else "-"


def _difference(
    cell: AblationCell, own: Interval, metric: MetricSpec, decimals: int
) -> dict[str, Any]:
    if cell.difference is None:
        return {}
    count = cell.difference.num if cell.difference.num != own.num else None
    return {
        "difference": _amount(cell.difference, decimals, count, sign="+"),
        "is_clear": cell.difference.excludes_zero,
        "is_better": cell.difference.mean * (1 if metric.mode == "max" else -1) > 0,
    }


def _amount(found: Interval, decimals: int, count: int | None, sign: str = "") -> Amount:
    half = f"{found.half:.{decimals}f}" if found.is_known else None
    return Amount(mean=f"{found.mean:{sign}z.{decimals}f}", half=half, count=count)


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_FOOTNOTE else f"{text[: _MAX_FOOTNOTE - 3]}..."
