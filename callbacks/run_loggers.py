"""TensorBoard and CSV logs that belong to a run directory and survive its restarts."""

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from segalign.atomic import make_directory, storage_errors, write_text_atomic


class RunCSVLogger(Logger):
    """Append metrics to one ``metrics.csv`` per run, whatever the number of attempts.

    Lightning's own CSV logger deletes the history when a run resumes. Here a resumed run keeps the
    rows before the step that it resumes at, and repeats those after it.

    Args:
        save_dir: Directory of ``metrics.csv``.
        resume_step: Optimizer step at which this attempt starts; rows from there on are dropped.
    """

    def __init__(self, save_dir: str | os.PathLike[str], resume_step: int = 0) -> None:
        super().__init__()
        self._directory = Path(save_dir)
        self._resume_step = resume_step
        self._columns: list[str] = []
        self._is_open = False

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return self._directory.name

    @property
    @override
    def save_dir(self) -> str:
        return str(self._directory)

    @property
    @override
    def log_dir(self) -> str:
        return str(self._directory)

    @property
    def metrics_file(self) -> Path:
        """The CSV file."""
        return self._directory / "metrics.csv"

    @override
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the run directory holds the resolved config."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Append one row; a new metric widens the table."""
        self._open()
        row = {name: _number(value) for name, value in metrics.items()}
        row["step"] = -1 if step is None else step
        new_columns = [name for name in row if name not in self._columns]
        if new_columns:
            self._rewrite([*self._columns, *sorted(new_columns)], self._read())
        with (
            storage_errors(self.metrics_file),
            self.metrics_file.open("a", newline="", encoding="utf-8") as file,
        ):
            csv.DictWriter(file, self._columns).writerow(row)

    def _open(self) -> None:
        if self._is_open:
            return
        self._is_open = True
        make_directory(self._directory)
        rows = [row for row in self._read() if int(row["step"]) < self._resume_step]
        columns = ["step", "epoch", *(name for row in rows[:1] for name in row)]
        self._rewrite(list(dict.fromkeys(columns)), rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.metrics_file.exists():
            return []
        content = self.metrics_file.read_bytes()
        # A kill in the middle of a write leaves a last row that is cut off, maybe inside a number.
        table = content[: content.rfind(b"\n") + 1].decode("utf-8")
        rows = csv.DictReader(io.StringIO(table, newline=""))
        return [row for row in rows if _is_whole(row)]

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(self.metrics_file, text.getvalue())


def run_loggers(run_dir: Path, stage: str, resume_step: int) -> list[Logger]:
    """Make the loggers of a run: TensorBoard and CSV under ``RUN/logs``.

    Args:
        run_dir: The run directory.
        stage: ``fit``, or another subcommand, which logs to a directory of its own.
        resume_step: Optimizer step at which this attempt starts.
    """
    version = "logs" if stage == "fit" else f"logs/{stage}"
    purge_step = resume_step if resume_step > 0 else None
    tensorboard = TensorBoardLogger(
        run_dir, name="", version=version, default_hp_metric=False, purge_step=purge_step
    )
    return [tensorboard, RunCSVLogger(run_dir / version, resume_step)]


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _is_whole(row: Mapping[str | None, str | None]) -> bool:
    return None not in row and None not in row.values() and bool(row["step"])
