"""Callbacks and data for runs that a signal stops."""

import os
import signal
import subprocess
import time

import torch
import toy_house
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

MOMENTS = ("fit_start", "step", "validation", "validation_epoch_end", "save")


class Signal(Callback):
    """Send a signal to this very process, or to its group, at a moment of a run."""

    def __init__(
        self, number: int, at_step: int = 0, moment: str = "step", rank: int = 0,
        times: int = 1, to_group: bool = False,
    ):  # fmt: skip
        super().__init__()
        assert moment in MOMENTS
        self.number, self.at_step, self.moment, self.rank = number, at_step, moment, rank
        self.times, self.to_group = times, to_group
        self.is_sent = False

    def send(self, trainer, moment):
        wanted = (self.moment, self.at_step, self.rank)
        if self.is_sent or wanted != (moment, trainer.global_step, trainer.global_rank):
            return
        self.is_sent = True
        for _ in range(self.times):
            if self.to_group:
                # From outside: what a parent itself sends to its children is another matter.
                subprocess.run(["kill", f"-{self.number}", "--", f"-{os.getpgid(0)}"], check=False)
            else:
                signal.raise_signal(self.number)

    def on_fit_start(self, trainer, pl_module):
        self.send(trainer, "fit_start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.send(trainer, "step")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.send(trainer, "validation")

    def on_validation_epoch_end(self, trainer, pl_module):
        self.send(trainer, "validation_epoch_end")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.send(trainer, "save")


class SlowEnd(Callback):
    """Let rank 0 end some seconds after the others, and then by a signal if it heeds it."""

    def __init__(self, seconds: float, number: int = 0):
        super().__init__()
        self.seconds, self.number = seconds, number

    def on_exception(self, trainer, pl_module, exception):
        if trainer.is_global_zero:
            time.sleep(self.seconds)
            if self.number:
                signal.raise_signal(self.number)


class Wait(Callback):
    """Give signals the time to do what they do, before a step."""

    def __init__(self, at_step: int, seconds: float):
        super().__init__()
        self.at_step, self.seconds = at_step, seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.seconds if trainer.global_step == self.at_step else 0)


class Group(Callback):
    """Put this process into a group of its own."""

    def setup(self, trainer, pl_module, stage):
        os.setpgid(0, 0)


class WorkerData(toy_house.ToyData):
    """The same data from two other processes."""

    def train_dataloader(self):
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        stream = ShardedStream(self.seed, first)
        return DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)


class ShardedStream(toy_house.ToyStream):
    """Every worker reads its own batches of the stream."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        for place, item in enumerate(super().__iter__()):
            if place % info.num_workers == info.id:
                yield item
