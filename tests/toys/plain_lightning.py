"""One tiny training with Lightning's defaults, and with what a run of this project has instead."""

import json
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from callbacks.checkpoint import RunCheckpoint, SafetensorsCheckpointIO
from callbacks.step_rng import StepRng
from segalign.data.order import BatchPlan, EpochOrder
from segalign.rng import counter_normal
from segalign.run_directory import newest_checkpoint

SEED, STEPS, EVERY, BATCH, SAMPLES = 7, 60, 5, 4, 50


class Plain(pl.LightningModule):
    """A network with dropout from the global generator."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Linear(6, 1))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]).squeeze(-1) - batch[0].sum(-1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class LossLog(Callback):
    """Append every step's loss, exactly, and die by SIGKILL after some step."""

    def __init__(self, path: Path, kill_at: int | None):
        super().__init__()
        self.path, self.kill_at = path, kill_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.global_step, outputs["loss"].item().hex()]) + "\n")
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class OrderedRows(IterableDataset):
    """The same samples in an order that is a function of the position."""

    def __init__(self, rows: torch.Tensor, trainer: pl.Trainer):
        self.rows, self.trainer = rows, trainer

    def __iter__(self):
        order, plan = EpochOrder([len(self.rows)], seed=SEED), BatchPlan(global_batch_size=BATCH)
        for step in plan.micro_batches(start=self.trainer.global_step, stop=None):
            ids = [order.locate(position)[1] for position in plan.positions(step)]
            yield [self.rows[ids]]


def samples() -> torch.Tensor:
    return counter_normal("plain samples", [(row,) for row in range(SAMPLES)], (5,))


def fit(folder: Path, *, ours: bool, kill_at: int | None) -> None:
    """Train, from the newest checkpoint of the folder on."""
    torch.set_num_threads(1)
    pl.seed_everything(SEED, verbose=False)
    log = LossLog(folder / "losses.jsonl", kill_at)
    saving = RunCheckpoint(EVERY) if ours else ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=EVERY
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=STEPS, default_root_dir=folder, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[log, saving, *([StepRng(SEED)] if ours else [])],
        plugins=[SafetensorsCheckpointIO()] if ours else None,
    )  # fmt: skip
    loader = (
        DataLoader(OrderedRows(samples(), trainer), batch_size=None)
        if ours
        else DataLoader(TensorDataset(samples()), batch_size=BATCH, shuffle=True)
    )
    last = newest_checkpoint(folder) if ours else folder / "last.ckpt"
    is_there = last is not None and last.exists()
    trainer.fit(Plain(), loader, ckpt_path=last if is_there else None)


def fit_in_child(folder: Path, *, ours: bool, kill_at: int | None = None) -> int:
    """Train in a forked process; return its exit code, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            fit(folder, ours=ours, kill_at=kill_at)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def losses(folder: Path) -> dict[int, set[str]]:
    """Read all losses that were ever recorded for each step."""
    found: dict[int, set[str]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        step, loss = json.loads(line)
        found.setdefault(step, set()).add(loss)
    return found
