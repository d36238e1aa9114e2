"""What becomes of a run whose checkpoint finds no room on the disk."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks.kept_rows import flush_logs
from segalign.errors import FullDiskError
from segalign.ranks import together

_logger = logging.getLogger(__name__)


class FailedSaves:
    """Counts saves in a row that found no room, on all ranks alike.

    Args:
        at_most: So many of them are told in a warning; one more ends the run.
    """

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._in_a_row = 0

    def tolerate(self, trainer: pl.Trainer, save: Callable[[], None]) -> bool:
        """Save, or say why that was not possible; every rank must call it.

        Args:
            trainer: The trainer.
            save: What saves; where it fails, it fails on all ranks with the same error.

        Returns:
            Whether it is saved.

        Raises:
            StorageError: If too many saves in a row have failed, or one for another reason than
                want of room.
        """
        try:
            save()
        except FullDiskError as error:
            self._in_a_row += 1
            if self._in_a_row > self._at_most:
                raise
            if trainer.is_global_zero:
                _logger.warning(
                    "going on without a checkpoint, failure %d in a row of at most %d "
                    "(`checkpoint.max_failed_saves`): %s",
                    self._in_a_row,
                    self._at_most,
                    error,
                )
            return False
        self._in_a_row = 0
        return True

    def forgive(self, trainer: pl.Trainer, write: Callable[[], None]) -> bool:
        """Write what a run can do without, where saves may fail; every rank must call it.

        Args:
            trainer: The trainer.
            write: What writes; where it fails, it fails on all ranks with the same error.

        Returns:
            Whether it is written.

        Raises:
            StorageError: If no save may fail, or for another reason than want of room.
        """
        try:
            write()
        except FullDiskError as error:
            if not self._at_most:
                raise
            if trainer.is_global_zero:
                _logger.warning("going on without a record: %s", error)
            return False
        return True


def save_on_rank_zero(trainer: pl.Trainer, path: Path) -> None:
    """Write what the loggers hold, and then a checkpoint; every rank must call it.

    ``Trainer.save_checkpoint`` lets the other ranks wait for one whose disk is full.

    Args:
        trainer: The trainer.
        path: The checkpoint.

    Raises:
        StorageError: On every rank, if rank 0 cannot write it.
    """

    def write() -> None:
        # A checkpoint says that what was logged before it is on disk: a resumed run goes on there.
        flush_logs(trainer)
        trainer.strategy.save_checkpoint(checkpoint, path)

    internals: Any = trainer
    with internals.profiler.profile("save_checkpoint"):
        checkpoint = internals._checkpoint_connector.dump_checkpoint(False)
        together(write)
