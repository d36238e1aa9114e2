"""Callbacks and data for runs in which something never ends, or only seems so."""

import itertools
import re
import time
from pathlib import Path

import torch
import toy_house
from lightning.pytorch.callbacks import Callback
from torch import distributed
from torch.utils.data import DataLoader


def sleep_for_ever():
    while True:
        time.sleep(0.3)


def work_for_ever():
    for depth in itertools.cycle(range(20)):
        sleep_deeply(depth, 0.05)


def hold_the_interpreter():
    # It would take longer than the age of the universe, and lets no other thread run.
    re.match(r"(a+)+$", "a" * 100 + "b")


def join_a_collective_alone(group):
    distributed.barrier(group)


class Hang(Callback):
    """Hang on one rank before a training batch; with ``alone``, the other one works on.

    Just before, the file ``RUN/hangs`` is made.
    """

    def __init__(self, kind: str, at_step: int = 2, rank: int = 1):
        super().__init__()
        self.kind, self.at_step, self.rank = kind, at_step, rank
        self.group = None

    def on_fit_start(self, trainer, pl_module):
        if self.kind == "collective":
            self.group = distributed.new_group(backend="gloo")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != self.at_step:
            return
        if trainer.global_rank != self.rank:
            if self.kind == "alone":
                work_for_ever()
            return
        (Path(trainer.default_root_dir) / "hangs").touch()
        if self.kind in ("sleep", "alone"):
            sleep_for_ever()
        elif self.kind == "interpreter":
            hold_the_interpreter()
        elif self.kind == "collective":
            join_a_collective_alone(self.group)


class HangInValidation(Hang):
    """Hang on one rank in the validation after a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


class Slow(Callback):
    """Take some time for every batch, and long in one hook, but at ever other places."""

    def __init__(self, seconds: float, hook_seconds: float, at_step: int = 2):
        super().__init__()
        self.seconds, self.hook_seconds, self.at_step = seconds, hook_seconds, at_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(self.seconds)
        if trainer.global_step == self.at_step:
            for depth in range(20):
                sleep_deeply(depth, self.hook_seconds / 20)


def sleep_deeply(depth: int, seconds: float):
    if depth:
        sleep_deeply(depth - 1, seconds)
    else:
        time.sleep(seconds)


class StuckData(toy_house.ToyData):
    """Data from another process, which stops to deliver on one rank."""

    def __init__(self, seed: int = 0, rank: int = 1):
        super().__init__(seed=seed)
        self.rank = rank

    def train_dataloader(self):
        is_stuck = self.trainer.global_rank == self.rank
        stream = StuckStream(self.seed, 0) if is_stuck else toy_house.ToyStream(self.seed, 0)
        return DataLoader(stream, batch_size=None, num_workers=1)


class StuckStream(toy_house.ToyStream):
    def __iter__(self):
        for place, item in enumerate(super().__iter__()):
            if place == 3:
                assert torch.utils.data.get_worker_info() is not None
                sleep_for_ever()
            yield item
