"""What a run holds of its machine at each step, and a module that needs next to nothing of it."""

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from torch import nn


class PixelModule(pl.LightningModule):
    """One linear layer on the channels' means of the real datamodule's images."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = None
        self.head = nn.Linear(3, 1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def loss(self, batch) -> torch.Tensor:
        means = batch["images"].mean((-2, -1))
        lengths = torch.tensor([len(caption) / 1000 for caption in batch["captions"]])
        return (self.head(means).squeeze(-1) - lengths).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log_dict({"train/loss": loss, "train/rows": float(len(batch["captions"]))})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), batch_size=len(batch["captions"]))


class ResourceLog(Callback):
    """Append what the run and its child processes hold to ``RUN/resources.jsonl``.

    Each line holds the step, the resident memory (bytes), open file descriptors and threads of
    the whole tree of processes, and the number of child processes.

    Args:
        every_n_steps: Optimizer steps between two lines.
    """

    def __init__(self, every_n_steps: PositiveInt = 50) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step > 0:
            path = Path(trainer.default_root_dir) / "resources.jsonl"
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **held(os.getpid())}) + "\n")


def held(process_id: int) -> dict[str, Any]:
    """Count what a process and its children hold."""
    root = psutil.Process(process_id)
    children = root.children(recursive=True)
    tree = [root, *children]
    return {
        "memory": sum(process.memory_info().rss for process in tree),
        "files": sum(process.num_fds() for process in tree),
        "threads": sum(process.num_threads() for process in tree),
        "children": len(children),
    }
