import csv
import errno
import logging
import os

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.run_loggers import RunCSVLogger, run_loggers
from segalign import appended_file
from segalign.appended_file import AppendedFile
from segalign.errors import FullDiskError, StorageError


def rows(logger: RunCSVLogger) -> list[dict[str, str]]:
    with logger.metrics_file.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once_and_columns_grow(tmp_path):
    logger = RunCSVLogger(tmp_path / "logs")
    logger.log_metrics({"b": torch.tensor(1.5), "a": 1, "epoch": 0}, 0)
    assert rows(logger) == [{"step": "0", "epoch": "0", "a": "1", "b": "1.5"}]
    logger.log_metrics({"val/x": 0.1 + 0.2}, 1)
    assert rows(logger) == [
        {"step": "0", "epoch": "0", "a": "1", "b": "1.5", "val/x": ""},
        {"step": "1", "epoch": "", "a": "", "b": "", "val/x": "0.30000000000000004"},
    ]


def test_a_resumed_run_keeps_the_past_and_repeats_the_rest(tmp_path):
    logger = RunCSVLogger(tmp_path)
    for step in range(6):
        logger.log_metrics({"loss": step / 10}, step)
    resumed = RunCSVLogger(tmp_path, resume_step=4)
    resumed.log_metrics({"loss": 0.4, "new": 1}, 4)
    assert [(row["step"], row["loss"], row["new"]) for row in rows(resumed)] == [
        ("0", "0.0", ""),
        ("1", "0.1", ""),
        ("2", "0.2", ""),
        ("3", "0.3", ""),
        ("4", "0.4", "1"),
    ]


def test_a_new_run_starts_a_new_table(tmp_path):
    RunCSVLogger(tmp_path).log_metrics({"loss": 1}, 0)
    fresh = RunCSVLogger(tmp_path)
    fresh.log_metrics({"other": 2}, 0)
    assert rows(fresh) == [{"step": "0", "epoch": "", "other": "2"}]


@pytest.mark.parametrize("left", ["1,", "1,,3", "1,,3,0.25", "1,,3,0.257\r"])
def test_a_row_that_a_kill_cut_off_is_dropped(tmp_path, left):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"a": 1, "b": 2}, 0)
    with logger.metrics_file.open("a", newline="") as file:
        file.write(left)
    resumed = RunCSVLogger(tmp_path, resume_step=9)
    resumed.log_metrics({"a": 4, "b": 5}, 9)
    assert [row["step"] for row in rows(resumed)] == ["0", "9"]


def test_an_unwritable_place_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    for logger in run_loggers(tmp_path / "file", "fit", 0):
        logger.log_metrics({"a": 1}, 0)
        logger.save()
        with pytest.raises(StorageError, match="Not a directory"):
            logger.flush_all()


def test_a_run_has_both_loggers_under_its_directory(tmp_path):
    tensorboard, table = run_loggers(tmp_path, "fit", 0)
    assert isinstance(tensorboard, TensorBoardLogger)
    assert tensorboard.log_dir == table.log_dir == str(tmp_path / "logs")
    tensorboard, table = run_loggers(tmp_path, "validate", 0)
    assert tensorboard.log_dir == table.log_dir == str(tmp_path / "logs" / "validate")


def test_tensorboard_purges_what_a_resumed_run_repeats(tmp_path):
    assert run_loggers(tmp_path, "fit", 7)[0]._kwargs["purge_step"] == 7
    assert run_loggers(tmp_path, "fit", 0)[0]._kwargs["purge_step"] is None


@pytest.fixture
def full_disk(monkeypatch):
    """Let nothing be appended until it is called."""

    class Full(AppendedFile):
        def flush(self, *, sync=False):
            with appended_file.storage_errors(self.path, self.num_waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flush = AppendedFile.flush
    monkeypatch.setattr(AppendedFile, "flush", Full.flush)
    return lambda: monkeypatch.setattr(AppendedFile, "flush", flush)


def test_rows_wait_while_the_disk_is_full(tmp_path, full_disk, caplog):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            logger.log_metrics({"a": 1}, step)
    assert len(caplog.messages) == 1
    assert "No space left on device (" in caplog.messages[0]
    with pytest.raises(FullDiskError, match=r"metrics\.csv"):
        logger.flush_all()
    with pytest.raises(FullDiskError):
        logger.finalize("success")
    logger.finalize("failed")  # the user has been told
    assert [row["step"] for row in rows(logger)] == ["0"]
    full_disk()
    logger.log_metrics({"a": 1, "b": 2}, 3)
    assert [row["step"] for row in rows(logger)] == ["0", "1", "2", "3"]


def test_tensorboard_reads_what_is_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, resume_step in ((0, 0), (3, 3)):
        logger = run_loggers(tmp_path, "fit", resume_step)[0]
        for step in range(first, 5):
            logger.log_metrics({"loss": step + 10 * first}, step)
        logger.save()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        *((step, float(step)) for step in range(3)),
        (3, 33.0),
        (4, 34.0),
    ]
