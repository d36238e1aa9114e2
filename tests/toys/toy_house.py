"""A module and a datamodule small enough to train in a test, with the habits of the real ones."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from segalign.rng import counter_normal


class ToyStream(IterableDataset):
    """An endless stream without a length, whose k-th batch is a function of (seed, k)."""

    def __init__(self, seed: int, first: int):
        self.seed, self.first = seed, first

    def __iter__(self):
        batch = self.first
        while True:
            yield (
                torch.full((1,), batch),
                counter_normal("toy data", [(self.seed, batch, row) for row in range(4)], (5,)),
            )
            batch += 1


class ToyData(pl.LightningDataModule):
    def __init__(self, seed: int = 0, root: str = "data", val_batches: PositiveInt = 2):
        super().__init__()
        self.seed, self.root, self.val_batches = seed, root, val_batches

    def train_dataloader(self):
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(ToyStream(self.seed, first), batch_size=None)

    def val_dataloader(self):
        rows = [(self.seed, 10**6 + row) for row in range(2 * self.val_batches)]
        return DataLoader(counter_normal("toy data", rows, (5,)), batch_size=2)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class ToyModule(pl.LightningModule):
    """A frozen encoder, a trained head and dropout from the global generator."""

    def __init__(
        self,
        width: PositiveInt = 6,
        scale: PositiveFloat = 1.0,
        token_length: PositiveInt = 240,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        self.width, self.scale, self.token_length = width, scale, token_length
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.ema = None
        self.head: nn.Module | None = None

    def configure_model(self):
        if self.head is None:
            self.encoder = nn.Linear(5, self.width).requires_grad_(False)
            self.head = nn.Sequential(nn.BatchNorm1d(self.width), nn.Linear(self.width, 1))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.optimizer(trained)
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.dropout(self.encoder(rows), 0.3, self.training)
        return self.scale * (self.head(hidden).squeeze(-1) - rows.sum(-1)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.loss(batch)


class LossRecorder(Callback):
    """Append every micro-batch's loss, exactly, to ``RUN/losses.jsonl``."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        record: dict[str, Any] = {
            "batch": int(batch[0]),
            "step": trainer.global_step,
            "loss": outputs["loss"].item().hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
        }
        with (Path(trainer.default_root_dir) / "losses.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


class Notes(Callback):
    """A callback with arguments, for config tests."""

    def __init__(self, note: str = "", number: int = 0):
        super().__init__()
        self.note, self.number = note, number


class Stop(Callback):
    """Ask for an early stop after some optimizer steps, as early stopping does."""

    def __init__(self, at_step: int):
        super().__init__()
        self.at_step = at_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.at_step


class Kill(Callback):
    """End this very process by SIGKILL at an optimizer step."""

    def __init__(self, at_step: int):
        super().__init__()
        self.at_step = at_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at_step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillWhileSaving(Callback):
    """End this very process by SIGKILL at the n-th time that a checkpoint's file is synced."""

    def __init__(self, at_sync: int):
        super().__init__()
        self.at_sync = at_sync

    def on_train_start(self, trainer, pl_module):
        fsync, count = os.fsync, itertools.count(1)

        def fsync_or_die(descriptor):
            target = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            if "/checkpoints" in target and next(count) == self.at_sync:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = fsync_or_die


class LargerModule(ToyModule):
    """Needs a weight that no checkpoint of ``ToyModule`` has."""

    def configure_model(self):
        super().configure_model()
        self.other = nn.Linear(1, 1, bias=False)
