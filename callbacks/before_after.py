"""How a report of before and after training is shown: a table, and pictures side by side."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from segalign.atomic import write_text_atomic
from segalign.metrics.report_table import ReportTable, wide_console
from segalign.pictures import Panel, panel_grid


def is_written(run_dir: Path) -> bool:
    """Tell whether a run has its report."""
    return (run_dir / "report.md").is_file()


def write_report(
    run_dir: Path, table: ReportTable, panels: Sequence[Panel], *, facts: str = ""
) -> None:
    """Print the table, and write ``report.md`` and ``report.png`` to the run directory.

    Args:
        run_dir: The run directory.
        table: The figures.
        panels: Prompts with their pictures.
        facts: A paragraph below the table: what was measured, on how much.
    """
    console = wide_console()
    console.print(table.to_rich())
    if facts:
        console.print(facts)
    picture = run_dir / "report.png"
    panel_grid(panels, columns=3, side=140, max_lines=14).save(picture)
    write_text_atomic(run_dir / "report.md", table.to_markdown() + (facts and f"\n{facts}\n"))
    console.print(_caption(run_dir), soft_wrap=True, markup=False)


def show_written_report(run_dir: Path) -> None:
    """Print the report of a run that was finished before."""
    console = Console()
    console.print("This run was finished before.", (run_dir / "report.md").read_text())
    console.print(_caption(run_dir), soft_wrap=True, markup=False)


def _caption(run_dir: Path) -> str:
    return f"Prompts with images before and after: {run_dir / 'report.png'}"
