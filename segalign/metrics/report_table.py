"""A table that people read in a terminal or as Markdown."""

from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_MIN_WIDTH: Final = 120


def wide_console() -> Console:
    """Return a console for tables: one that wraps cannot be read, too wide a line can."""
    return Console(width=max(Console().width, _MIN_WIDTH))


@dataclass(frozen=True)
class ReportTable:
    """A table of text.

    Attributes:
        title: What the numbers are.
        headings: Of the columns.
        rows: Cells, as many in each row as there are headings.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        """Write the title as a paragraph and the table below it."""
        lines = [
            f"{self.title}:",
            "",
            f"| {' | '.join(self.headings)} |",
            "|---" * len(self.headings) + "|",
            *(f"| {' | '.join(row)} |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"

    def to_rich(self) -> Table:
        """Draw the table for a terminal; brackets in its text are text."""
        table = Table(title=escape(self.title))
        for heading in self.headings:
            table.add_column(escape(heading), no_wrap=True)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table
