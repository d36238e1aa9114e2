"""Write the table of a study as Markdown, CSV, LaTeX, or for a terminal."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from segalign.csv_text import plain_cell
from segalign.launch.findings.ablation import AblationTable, Interval
from segalign.launch.findings.ablation_text import Amount, CellText, RowText, TableText, table_text

_FIELDS: Final = (
    "variant", "is_base", "seed", "run_id", "status", "metric", "mode", "at", "value",
)  # fmt: skip
_STATISTICS: Final = (
    "variant", "is_base", "metric", "mode", "at", "num_runs", "num_done", "num_failed", "mean",
    "low", "high", "num", "difference", "difference_low", "difference_high", "difference_num",
)  # fmt: skip
_ARROWS: Final = {"max": "↑", "min": "↓"}
_LATEX: Final = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "`": r"\textasciigrave{}", "[": "{[}", "]": "{]}", "±": r"$\pm$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "ω": r"$\omega$", "≥": r"$\geq$", "≤": r"$\leq$",
}  # fmt: skip
# What Markdown would take for a sign of its own; an underscore within a word it would not.
_MARKDOWN_SIGNS: Final = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
_CODE: Final = re.compile(r"(`[^`]+`)")


def to_markdown(table: AblationTable) -> str:
    """Write a Markdown table, and its notes below.

    A cell reads ``mean ± half (difference ± half)``; arrows point to the better side, ``*`` marks a
    difference whose interval excludes zero, and numbers in brackets are footnotes.
    """
    text = table_text(table)
    headings = ["variant", *_headings(text, _markdown, _ARROWS.__getitem__, _brackets), "runs"]
    lines = [
        f"**{_markdown(text.title)}**",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|{'---:|' * (len(headings) - 1)}",
        *(f"| {' | '.join(_row(row, _markdown, _plain_cell, _brackets))} |" for row in text.rows),
        "",
        *(f"- {_markdown_note(note)}" for note in text.notes),
        *(f"- [{number}] {_markdown_note(one)}" for number, one in enumerate(text.footnotes, 1)),
    ]
    return "\n".join(lines) + "\n"


def to_csv(table: AblationTable) -> str:
    """Write one line for each variant and metric: mean, interval, and difference to the base.

    Numbers are exact; what is not known is empty.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_STATISTICS)
    for row in table.rows:
        counts = (row.num_runs, row.num_done, row.num_failed)
        for metric in table.metrics:
            cell = row.cells[metric.name]
            own = (
                plain_cell(row.label),
                row.label == table.base_label,
                metric.name,
                metric.mode,
                metric.at,
            )
            writer.writerow([*own, *counts, *_numbers(cell.interval), *_numbers(cell.difference)])
    return text.getvalue()


def _numbers(found: Interval | None) -> list[float | int | str]:
    if found is None:
        return ["", "", "", 0]
    ends = [found.low, found.high] if found.is_known else ["", ""]
    return [found.mean, *ends, found.num]


def to_runs_csv(table: AblationTable) -> str:
    """Write one line for each variant, seed and metric: the long form, which programs read best.

    Values are exact. That of a run that is not finished is empty; that of a finished run without
    such a number is ``nan``.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FIELDS)
    for row in table.rows:
        for run in row.runs:
            own = (
                plain_cell(row.label),
                row.label == table.base_label,
                run.seed,
                run.run_id,
                run.status,
            )
            for metric in table.metrics:
                value = row.cells[metric.name].by_seed.get(run.seed, "")
                writer.writerow([*own, metric.name, metric.mode, metric.at, value])
    return text.getvalue()


def to_latex(table: AblationTable) -> str:
    r"""Write a ``table`` of LaTeX, which needs the package ``booktabs``.

    Cells are as in `to_markdown`, with ``\pm``; notes are small print below. Labels may hold any
    text; letters that pdfLaTeX does not know want LuaLaTeX.
    """
    text = table_text(table)
    headings = [
        "variant",
        *_headings(text, _latex, lambda mode: _latex(_ARROWS[mode]), _superscript),
        "runs",
    ]
    rows = [_row(row, _latex, _latex_cell, _superscript) for row in text.rows]
    notes = [_latex_note(note) for note in text.notes]
    notes += [f"{_superscript((n,))} {_latex_note(one)}" for n, one in enumerate(text.footnotes, 1)]
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{_latex(text.title)}}}",
        f"  \\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"    \toprule",
        f"    {' & '.join(headings)} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        *(f"  \\par\\footnotesize {note}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_rich(table: AblationTable) -> Group:
    """Draw the table for a terminal, differences below means, and its notes.

    Differences whose interval excludes zero are green on the better side and red on the worse.
    """
    text = table_text(table)
    drawn = Table(title=Text(text.title), show_lines=True)
    drawn.add_column("variant", overflow="fold")
    for heading in _headings(text, str, _ARROWS.__getitem__, _brackets):
        drawn.add_column(Text(heading), justify="right", overflow="fold")
    drawn.add_column("runs", justify="right")
    for row in text.rows:
        cells = [_terminal_cell(cell) for cell in row.cells]
        drawn.add_row(Text(_label(row, str, _brackets)), *cells, row.runs)
    notes = [*text.notes, *(f"[{n}] {one}" for n, one in enumerate(text.footnotes, 1))]
    return Group(drawn, *map(Text, notes))


Escape = Callable[[str], str]
Marks = Callable[[Sequence[int]], str]


def _headings(text: TableText, escape: Escape, arrow: Escape, marks: Marks) -> list[str]:
    return [
        f"{escape(metric.label)} {arrow(metric.mode)}{marks(own)}"
        for metric, own in zip(text.metrics, text.marks, strict=True)
    ]


def _row(row: RowText, escape: Escape, cell: Callable[[CellText], str], marks: Marks) -> list[str]:
    cells = [f"{cell(one)}{marks(one.marks)}" for one in row.cells]
    return [_label(row, escape, marks), *cells, row.runs]


def _label(row: RowText, escape: Escape, marks: Marks) -> str:
    return f"{escape(row.label)}{' (base)' if row.is_base else ''}{marks(row.marks)}"


def _plain_cell(cell: CellText) -> str:
    """Write a cell; the star of Markdown needs no escape where it stands alone after a digit."""
    if cell.amount is None:
        return cell.absent
    if cell.difference is None:
        return _plain(cell.amount)
    return f"{_plain(cell.amount)} ({_plain(cell.difference)}){_star(cell)}"


def _star(cell: CellText) -> str:
    return r"\*" if cell.is_clear else ""


def _plain(amount: Amount) -> str:
    half = "" if amount.half is None else f" ± {amount.half}"
    return f"{amount.mean}{half}{_count(amount)}"


def _count(amount: Amount) -> str:
    return "" if amount.count is None else f", n={amount.count}"


def _latex_cell(cell: CellText) -> str:
    if cell.amount is None:
        return "--" if cell.absent == "-" else cell.absent
    if cell.difference is None:
        return _latex_amount(cell.amount)
    star = "$^{*}$" if cell.is_clear else ""
    return f"{_latex_amount(cell.amount)} ({_latex_amount(cell.difference)}){star}"


def _latex_amount(amount: Amount) -> str:
    half = "" if amount.half is None else rf" \pm {amount.half}"
    return f"${amount.mean}{half}${_count(amount)}"


def _terminal_cell(cell: CellText) -> Text:
    if cell.amount is None:
        return Text(f"-{_brackets(cell.marks)}")
    drawn = Text(_plain(cell.amount) + _brackets(cell.marks))
    if cell.difference is not None:
        style = ("green" if cell.is_better else "red") if cell.is_clear else ""
        star = "*" if cell.is_clear else ""
        drawn.append(f"\n({_plain(cell.difference)}){star}", style)
    return drawn


def _brackets(marks: Sequence[int]) -> str:
    return "".join(f" [{mark}]" for mark in marks)


def _superscript(marks: Sequence[int]) -> str:
    return rf"\textsuperscript{{{','.join(map(str, marks))}}}" if marks else ""


def _markdown(text: str) -> str:
    """Make text safe in a Markdown table."""
    return _escape_markdown(_one_line(text))


def _markdown_note(text: str) -> str:
    """Make a sentence safe; names between backticks are code."""
    parts = _CODE.split(_one_line(text))
    return "".join(part if _CODE.fullmatch(part) else _escape_markdown(part) for part in parts)


def _escape_markdown(text: str) -> str:
    safe = _MARKDOWN_SIGNS.sub(r"\\\g<0>", text)
    return safe.replace("&", "&amp;").replace("<", "&lt;")


def _latex(text: str) -> str:
    return _escape_latex(_one_line(text))


def _latex_note(text: str) -> str:
    """Make a sentence safe; names between backticks are set as such."""
    parts = _CODE.split(_one_line(text))
    return "".join(
        rf"\texttt{{{_escape_latex(part[1:-1])}}}" if _CODE.fullmatch(part) else _escape_latex(part)
        for part in parts
    )


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
