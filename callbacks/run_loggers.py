"""TensorBoard and CSV logs that belong to a run directory and survive its restarts."""

import contextlib
import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from callbacks.kept_rows import Patience
from callbacks.tensorboard_log import RunTensorBoardLogger
from segalign.appended_file import AppendedFile
from segalign.atomic import make_directory, remove_temporaries, storage_errors, write_text_atomic


class RunCSVLogger(Logger):
    """Append metrics to one ``metrics.csv`` per run, whatever the number of attempts.

    Lightning's own CSV logger deletes the history when a run resumes. Here a resumed run keeps the
    rows before the step that it resumes at, and repeats those after it. Rows that cannot be written
    wait in memory; ``flush_all``, which comes before every checkpoint and at the end, says so if
    they still do.

    Args:
        save_dir: Directory of ``metrics.csv``.
        resume_step: Optimizer step at which this attempt starts; rows from there on are dropped.
    """

    def __init__(self, save_dir: str | os.PathLike[str], resume_step: int = 0) -> None:
        super().__init__()
        self._directory = Path(save_dir)
        self._resume_step = resume_step
        self._columns: list[str] = []
        self._waiting: list[dict[str, float]] = []
        self._is_open = False
        self._file = AppendedFile(self.metrics_file)
        self._patience = Patience()

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
        row = {name: _number(value) for name, value in metrics.items()}
        row["step"] = -1 if step is None else step
        self._waiting.append(row)
        self.save()

    @override
    @rank_zero_only
    def save(self) -> None:
        """Write the rows that wait; if that cannot be done, say so once, and let them wait."""
        self._patience.try_to(partial(self._write, sync=False))

    @rank_zero_only
    def flush_all(self) -> None:
        """Write the rows that wait, and force all to disk.

        Raises:
            StorageError: If they cannot be written; they go on waiting.
        """
        with storage_errors(self.metrics_file):
            self._write(sync=True)

    def _write(self, *, sync: bool) -> None:
        if not self._waiting:
            if sync and self._is_open:
                self._file.flush(sync=True)
            return
        self._open()
        self._file.restore()
        names = {name for row in self._waiting for name in row}
        new_columns = sorted(names - set(self._columns))
        if new_columns:
            self._rewrite([*self._columns, *new_columns], [*self._read(), *self._waiting])
        else:
            self._append(self._waiting, sync)
        self._waiting = []

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the rows that wait; after a failure, as far as it goes."""
        with contextlib.suppress(*(() if status == "success" else (OSError,))):
            self.flush_all()

    def _open(self) -> None:
        if self._is_open:
            return
        make_directory(self._directory)
        remove_temporaries(self.metrics_file)
        rows = [row for row in self._read() if int(row["step"]) < self._resume_step]
        columns = ["step", "epoch", *(name for row in rows[:1] for name in row)]
        self._rewrite(list(dict.fromkeys(columns)), rows)
        self._is_open = True

    def _read(self) -> list[dict[str, str]]:
        if not self.metrics_file.exists():
            return []
        content = self.metrics_file.read_bytes()
        # A kill in the middle of a write leaves a last row that is cut off, maybe inside a number.
        table = content[: content.rfind(b"\n") + 1].decode("utf-8")
        rows = csv.DictReader(io.StringIO(table, newline=""))
        return [row for row in rows if _is_whole(row)]

    def _rewrite(self, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, columns).writeheader()
        csv.DictWriter(text, columns).writerows(rows)
        write_text_atomic(self.metrics_file, text.getvalue())
        self._columns = columns

    def _append(self, rows: Sequence[Mapping[str, Any]], sync: bool) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(rows)
        self._file.write(text.getvalue().encode())
        try:
            self._file.flush(sync=sync)
        finally:
            self._file.forget()  # the rows themselves wait, as a later one may widen the table


def run_loggers(run_dir: Path, stage: str, resume_step: int) -> list[Logger]:
    """Make the loggers of a run: TensorBoard and CSV under ``RUN/logs``.

    Args:
        run_dir: The run directory.
        stage: ``fit``, or another subcommand, which logs to a directory of its own.
        resume_step: Optimizer step at which this attempt starts.
    """
    version = "logs" if stage == "fit" else f"logs/{stage}"
    purge_step = resume_step if resume_step > 0 else None
    tensorboard = RunTensorBoardLogger(
        run_dir, name="", version=version, default_hp_metric=False, purge_step=purge_step
    )
    return [tensorboard, RunCSVLogger(run_dir / version, resume_step)]


def _number(value: float | Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def _is_whole(row: Mapping[str | None, str | None]) -> bool:
    return None not in row and None not in row.values() and bool(row["step"])
