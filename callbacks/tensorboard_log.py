"""TensorBoard logs that are whole after a full disk, written without a thread."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import (  # type: ignore[import-untyped]
    Event,
    SessionLog,
)
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter
from typing_extensions import override

from callbacks.kept_rows import Patience
from segalign.appended_file import AppendedFile
from segalign.atomic import make_directory, storage_errors

_LARGE = 2**20  # bytes that are written before their time


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's logger, whose records wait in memory while the disk is full.

    TensorBoard's own writer does its work in a thread, which dies of a full disk with a traceback
    and takes what it held with it. This one tells ``flush_all``, which comes before every
    checkpoint and at the end.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._patience = Patience()

    @property
    @rank_zero_experiment
    @override
    def experiment(self) -> SummaryWriter:
        """The writer, as PyTorch has it."""
        if self._experiment is None:
            self._experiment = _Summaries(log_dir=self.log_dir, **self._kwargs)
        return self._experiment

    @override
    @rank_zero_only
    def save(self) -> None:
        """Write what waits; if that cannot be done, say so once, and let it wait."""
        self._patience.try_to(super().save)

    @rank_zero_only
    def flush_all(self) -> None:
        """Write what waits, and force all to disk.

        Raises:
            StorageError: If it cannot be written; it goes on waiting.
        """
        with storage_errors(Path(self.log_dir)):
            super().save()
            own: Any = self._experiment
            if own is not None and own.file_writer is not None:
                own.file_writer.event_writer.flush(sync=True)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits; after a failure, of which the user has been told, as far as it goes."""
        if status == "success":
            self.flush_all()
            super().finalize(status)
        elif self._experiment is not None:
            with contextlib.suppress(OSError):
                self._experiment.flush()


class _Summaries(SummaryWriter):
    """PyTorch's writer of summaries on top of files without a thread."""

    @override
    def _get_file_writer(self) -> FileWriter:
        own: Any = self
        if own.file_writer is None:
            own.file_writer = _Records(self.log_dir, self.flush_secs, self.filename_suffix)
            own.all_writers = {self.log_dir: own.file_writer}
            if own.purge_step is not None:
                own.file_writer.purge(own.purge_step)
                own.purge_step = None
        writer: FileWriter = own.file_writer
        return writer


class _Records(FileWriter):
    def __init__(self, log_dir: str, flush_secs: float, suffix: str) -> None:
        self.event_writer = _EventFile(Path(log_dir), flush_secs, suffix)

    def purge(self, step: int) -> None:
        """Hide what earlier files hold from a step on."""
        self.add_event(Event(step=step, file_version="brain.Event:2"))
        self.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


class _EventFile:
    """What PyTorch needs of ``tensorboard.summary.writer.event_file_writer.EventFileWriter``."""

    def __init__(self, log_dir: Path, flush_secs: float, suffix: str) -> None:
        # Readers take files in the order of their names, and so that of a run's attempts.
        unique = f"{os.getpid()}.{time.time_ns()}{suffix}"
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{unique}"
        self._log_dir = log_dir
        self._flush_secs = flush_secs
        self._file = AppendedFile(log_dir / name)
        self._records = RecordWriter(self._file)
        self._flushed_at = -flush_secs
        self._has_place = False
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        return str(self._log_dir)

    def add_event(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        is_time = time.monotonic() > self._flushed_at + self._flush_secs
        if is_time or self._file.num_waiting > _LARGE:
            with contextlib.suppress(OSError):
                self.flush()

    def flush(self, *, sync: bool = False) -> None:
        self._flushed_at = time.monotonic()
        if self._file.num_waiting and not self._has_place:
            make_directory(self._file.path.parent)
            self._has_place = True
        self._file.flush(sync=sync)

    def close(self) -> None:
        self.flush()
