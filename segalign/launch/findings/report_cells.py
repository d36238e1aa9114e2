"""Cells of a report's table: text as in all other tables of the study, and numbers to sort by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from segalign.launch.findings.ablation import AblationCell, AblationRow, AblationTable
from segalign.launch.findings.ablation_text import Amount, CellText, RowText, TableText, table_text


@dataclass(frozen=True, kw_only=True)
class ReportCell:
    """A variant's number.

    Attributes:
        value: The mean, exact, for sorting; empty if there is none.
        text: The mean with half of its interval.
        difference: To the base variant, likewise; empty if there is none.
        verdict: What the difference says, if chance hardly explains it.
        seeds: Values by seed.
        marks: Numbers of footnotes.
    """

    value: str
    text: str
    difference: str
    verdict: Literal["better", "worse", ""]
    seeds: str
    marks: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """A variant.

    Attributes:
        label: Its label.
        is_base: Whether others are compared with it.
        runs: Finished and planned runs.
        num_done: Finished runs.
        is_whole: Whether all are finished.
        marks: Numbers of footnotes.
        cells: In the order of the metrics.
    """

    label: str
    is_base: bool
    runs: str
    num_done: int
    is_whole: bool
    marks: Sequence[int]
    cells: Sequence[ReportCell]


def report_rows(table: AblationTable) -> tuple[TableText, list[ReportRow]]:
    """Write the rows of a table; its title, notes and footnotes come along."""
    text = table_text(table)
    pairs = zip(table.rows, text.rows, strict=True)
    return text, [_row(row, own, table) for row, own in pairs]


def _row(row: AblationRow, text: RowText, table: AblationTable) -> ReportRow:
    pairs = zip(table.metrics, text.cells, strict=True)
    return ReportRow(
        label=row.label,
        is_base=text.is_base,
        runs=text.runs,
        num_done=row.num_done,
        is_whole=row.num_done == row.num_runs,
        marks=text.marks,
        cells=[_cell(row.cells[metric.name], own) for metric, own in pairs],
    )


def _cell(cell: AblationCell, text: CellText) -> ReportCell:
    mean = math.nan if cell.interval is None else cell.interval.mean
    verdict: Literal["better", "worse", ""] = ""
    if text.difference is not None and text.is_clear:
        verdict = "better" if text.is_better else "worse"
    return ReportCell(
        value=repr(mean) if math.isfinite(mean) else "",
        text=text.absent if text.amount is None else _amount(text.amount),
        difference="" if text.difference is None else _amount(text.difference),
        verdict=verdict,
        seeds=", ".join(f"seed {seed}: {value:.6g}" for seed, value in cell.by_seed.items()),
        marks=text.marks,
    )


def _amount(amount: Amount) -> str:
    half = "" if amount.half is None else f" ± {amount.half}"
    count = "" if amount.count is None else f" (n = {amount.count})"
    return f"{amount.mean}{half}{count}"
