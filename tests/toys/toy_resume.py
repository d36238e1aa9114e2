"""Runs that die at a moment of their progress, and a module that is cheap and has every habit."""

import functools
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from callbacks import outcome_log
from lightning_modules.training import TrainingModule
from segalign.rng import counter_normal
from segalign.text.conditioning import TextReport

KINDS = {
    "start": ("fit_start", "train_start"),
    "step": ("batch_start", "before_backward", "after_backward", "before_step", "batch_end"),
    "save": ("sync", "rename", "renamed"),
    "validation": ("validation_start", "validation_batch", "validation_end"),
    "evaluation": ("generate",),
    "end": ("train_end",),
}


class CaptionToy(TrainingModule):
    """Guess noise that depends on the sample from a table of samples, through dropout.

    Trains on batches of the real datamodule, with the real mean over valid samples.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        dropout: float = 0.3,
    ):
        super().__init__(optimizer, lr_scheduler)
        self.dropout = dropout
        self.head = None

    def configure_model(self):
        if self.head is None:
            self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))

    def losses(self, batch, step):
        rows = [(step, epoch, sample) for epoch, sample in ids_of(batch)]
        noise = counter_normal("toy noise", rows, (6,)).to(self.head[0].weight)
        inputs = counter_normal("toy input", [row[2:] for row in rows], (6,)).to(noise)
        hidden = nn.functional.dropout(inputs + 0.1 * noise, self.dropout, self.training)
        return (self.head(hidden) - noise).square().mean(dim=-1)

    def training_step(self, batch, batch_idx):
        one, none = ((count,) * len(batch["valid"]) for count in (1, 0))
        self.report_text(TextReport(one, none, none, one), batch)
        loss = self.reduce_losses(self.losses(batch, self.global_step), batch)
        self.log_train("loss", loss.detach(), batch)
        return loss

    def validation_step(self, batch, batch_idx):
        valid = batch["valid"]
        self.log("val/loss", self.losses(batch, 0)[valid].mean(), batch_size=int(valid.sum()))


def ids_of(batch) -> list[tuple[int, int]]:
    """Return epoch and sample id of each row."""
    return list(zip(batch["epochs"].tolist(), batch["sample_ids"].tolist(), strict=True))


class StepRecorder(Callback):
    """Append what every micro-batch served and lost, exactly, to ``RUN/steps-RANK.jsonl``."""

    def write(self, trainer, record: dict[str, Any]) -> None:
        path = Path(trainer.default_root_dir) / f"steps-{trainer.global_rank}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def setup(self, trainer, pl_module, stage):
        # Pictures of the curves, which say nothing here, take long to draw.
        outcome_log.write_curves = lambda *arguments, **options: None

    def on_train_start(self, trainer, pl_module):
        self.step, self.slot = trainer.global_step, 0
        self.write(trainer, {"began_at": self.step})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if outputs:
            # Lightning has divided it already.
            loss = outputs["loss"] * trainer.accumulate_grad_batches
        else:
            # What is logged is float32; a module that steps its optimizer itself keeps more.
            report = getattr(pl_module, "_report", None)
            loss = trainer.callback_metrics["train/loss"] if report is None else report.totals.sum()
        self.write(
            trainer,
            {
                "step": self.step,
                "slot": self.slot,
                "ids": ids_of(batch),
                "loss": float(loss).hex(),
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
            },
        )
        self.slot += 1
        if trainer.global_step > self.step:
            self.step, self.slot = trainer.global_step, 0


class Moments(Callback):
    """Die by SIGKILL at a moment of the training; or note all moments of an undisturbed one.

    A moment is its name, the optimizer steps taken so far, and how often it has come since.

    Args:
        name: One of ``KINDS``; none notes the moments in ``RUN/moments.jsonl`` instead.
        step: Optimizer steps taken; None is any number.
        time: How many moments of this name come before.
    """

    def __init__(self, name: str | None = None, step: int | None = None, time: int = 0):
        super().__init__()
        self.name, self.step, self.time = name, step, time
        self.noted, self.counts = [], Counter()

    def reach(self, trainer, name):
        step = trainer.global_step
        time = self.counts[name, step]
        self.counts[name, step] += 1
        if self.name is None:
            self.noted.append({"name": name, "step": step, "time": time})
        elif (name, time) == (self.name, self.time) and self.step in (None, step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_fit_start(self, trainer, pl_module):
        self.reach(trainer, "fit_start")
        self.watch_files(trainer)
        if hasattr(pl_module, "generate"):
            generate = pl_module.generate

            @functools.wraps(generate)
            def watched(*arguments, **options):
                self.reach(trainer, "generate")
                return generate(*arguments, **options)

            object.__setattr__(pl_module, "generate", watched)

    def watch_files(self, trainer):
        """Make moments of what happens to the files of checkpoints."""
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def watched_fsync(descriptor):
            if "/checkpoints" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                self.reach(trainer, "sync")
            fsync(descriptor)

        def watched(move, source, target, **options):
            is_ours = "/checkpoints/" in str(target)
            if is_ours:
                self.reach(trainer, "rename")
            move(source, target, **options)
            if is_ours:
                self.reach(trainer, "renamed")

        os.fsync = watched_fsync
        os.rename = functools.partial(watched, rename)
        os.replace = functools.partial(watched, replace)

    def on_train_start(self, trainer, pl_module):
        self.reach(trainer, "train_start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.reach(trainer, "batch_start")

    def on_before_backward(self, trainer, pl_module, loss):
        self.reach(trainer, "before_backward")

    def on_after_backward(self, trainer, pl_module):
        self.reach(trainer, "after_backward")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.reach(trainer, "before_step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.reach(trainer, "batch_end")

    def on_validation_start(self, trainer, pl_module):
        self.reach(trainer, "validation_start")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.reach(trainer, "validation_batch")

    def on_validation_epoch_end(self, trainer, pl_module):
        self.reach(trainer, "validation_end")

    def on_train_end(self, trainer, pl_module):
        self.reach(trainer, "train_end")

    def on_fit_end(self, trainer, pl_module):
        if self.name is None:
            lines = "".join(json.dumps(moment) + "\n" for moment in self.noted)
            (Path(trainer.default_root_dir) / "moments.jsonl").write_text(lines)
