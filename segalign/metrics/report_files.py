"""Write the files of a report: Markdown, CSV and a picture, each whole or not at all."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from segalign.atomic import write_bytes_atomic, write_text_atomic
from segalign.csv_text import plain_cell
from segalign.metrics.report_table import ReportTable

_DPI = 150


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        name: Of the files, without suffix.
        facts: One paragraph: what was evaluated, on how much.
        tables: What people read.
        records: What programs read, one row each, all with the same keys.
        figure: The picture.
    """

    name: str
    facts: str
    tables: Sequence[ReportTable]
    records: Sequence[Mapping[str, object]]
    figure: Figure

    def to_markdown(self) -> str:
        """Join the facts and the tables."""
        return "\n".join([f"{self.facts}\n", *(table.to_markdown() for table in self.tables)])

    def to_csv(self) -> str:
        """Write the records, with a header."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(self.records[0]), lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            writer.writerow({name: _plain(value) for name, value in record.items()})
        return text.getvalue()

    def write(self, folder: Path) -> list[Path]:
        """Write ``name.md``, ``name.csv`` and ``name.png``.

        Raises:
            StorageError: If one cannot be written.
        """
        picture = io.BytesIO()
        self.figure.savefig(picture, format="png", dpi=_DPI)
        paths = [folder / f"{self.name}{suffix}" for suffix in (".md", ".csv", ".png")]
        write_text_atomic(paths[0], self.to_markdown())
        write_text_atomic(paths[1], self.to_csv())
        write_bytes_atomic(paths[2], picture.getvalue())
        return paths


def _plain(value: object) -> object:
    """Keep names from being read as formulas; numbers may be written as text."""
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        return plain_cell(value)
    return value
