"""How far a training is, from the end of its log of metrics alone. Pure standard library."""

import csv
from pathlib import Path
from typing import Final

_TAIL: Final = 16 * 1024  # bytes; a row has a few hundred


def metrics_file(run_dir: Path) -> Path:
    """Name the file that a run's training logs its metrics to."""
    return run_dir / "logs" / "metrics.csv"


def logged_step(run_dir: Path) -> int | None:
    """Return how many optimizer steps a run has logged; None before the first."""
    try:
        with metrics_file(run_dir).open("rb") as file:
            head = file.readline()
            size = file.seek(0, 2)
            file.seek(max(len(head), size - _TAIL))
            tail = file.read()
    except OSError:
        return None
    try:
        column = next(csv.reader([head.decode()])).index("step")
    except (StopIteration, ValueError):
        return None
    # What follows the last line break is being written, or was cut off by a kill.
    for line in reversed(tail.split(b"\n")[:-1]):
        step = _cell(line, column)
        if step is not None:
            return step + 1  # steps of rows count from 0
    return None


def _cell(line: bytes, column: int) -> int | None:
    cells = next(csv.reader([line.decode(errors="replace").strip()]), [])
    try:
        return int(cells[column])
    except (IndexError, ValueError):
        return None
