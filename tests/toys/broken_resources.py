"""Runs that hold more and more of their machine, each in one way."""

import os
import threading
from typing import Any

from callbacks.checkpoint import RunCheckpoint
from datamodules.long_caption import LongCaptionDataModule
from segalign.data.loaders import BatchLoader
from segalign.data.reader import ShardFiles


def keeps_every_batch() -> None:
    """Keeps the tensors of every batch that a step has consumed."""
    kept: list[Any] = []
    consume = LongCaptionDataModule.consume

    def consume_and_keep(self, batch, stage="train"):
        consume(self, batch, stage)
        kept.append(batch)

    LongCaptionDataModule.consume = consume_and_keep


def opens_a_file_each_step() -> None:
    """Opens a file at every batch and never closes it."""
    consume = LongCaptionDataModule.consume

    def consume_and_open(self, batch, stage="train"):
        consume(self, batch, stage)
        os.open(os.devnull, os.O_RDONLY)

    LongCaptionDataModule.consume = consume_and_open


def never_closes_a_shard() -> None:
    """Opens a shard anew for every member that is read, and forgets the handle."""

    def read(self, shard, offset, size):
        return os.pread(os.open(self._folder / shard, os.O_RDONLY), size, offset)

    ShardFiles.read = read


def starts_a_thread_each_validation() -> None:
    """Starts a thread after every validation that waits for ever."""
    on_validation_end = RunCheckpoint.on_validation_end

    def end_and_start(self, trainer, pl_module):
        on_validation_end(self, trainer, pl_module)
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    RunCheckpoint.on_validation_end = end_and_start


def keeps_the_workers_of_each_validation() -> None:
    """Starts other worker processes for every iteration and never ends the old ones."""
    kept: list[Any] = []
    iterate = BatchLoader.__iter__

    def iterate_anew(self):
        loader = self._loader
        kept.append(loader)
        self._loader = type(loader)(
            loader.dataset,
            batch_size=None,
            num_workers=loader.num_workers,
            persistent_workers=loader.persistent_workers,
        )
        return iterate(self)

    BatchLoader.__iter__ = iterate_anew
