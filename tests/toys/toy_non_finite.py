"""Runs in which a number of one rank is not finite at some step, and what they leave behind."""

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sharded_runs
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, IterableDataset
from toy_tuning import ClipSource

from callbacks.ema import EMA
from callbacks.non_finite import NonFiniteSteps
from lightning_modules.sharded_strategy import ShardedStrategy
from lightning_modules.training import TrainingModule
from segalign.rewards.common_direction import EmaDirection
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.rng import counter_normal
from segalign.sharded_tensors import local
from segalign.trainable import trainable_parameters

BAD_STEP, NUM_STEPS = 1, 3
MICRO_BATCHES = {"stage one": 2}
# Where the number comes from: the loss; the loss alone, without its gradient; the gradient of one
# weight, before and after ranks average it.
KINDS = ("loss", "loss alone", "gradient", "averaged gradient")


@dataclass(frozen=True)
class Bad:
    """What goes wrong in a run of which module: one of ``KINDS``, or ``reward``.

    Nothing does ``by_hand``, where the optimizer is kept from that step, for comparison.
    """

    module: str
    kind: str = "by_hand"
    rank: int = 1
    value: float = float("nan")
    strategy: str = "ddp"


class Spoil(Callback):
    """Make a loss or a gradient not finite, at some steps of one rank.

    Args:
        rank: Which one.
        first: The first step that goes wrong.
        last: The last one.
        kind: Where the number comes from, see ``KINDS``.
        value: What it is.
    """

    def __init__(
        self,
        rank: int = 1,
        first: int = BAD_STEP,
        last: int = BAD_STEP,
        kind: str = "loss",
        value: float = float("nan"),
    ) -> None:
        super().__init__()
        self.rank, self.steps = rank, range(first, last + 1)
        self.kind, self.value = kind, value
        self.is_on = False

    def on_train_start(self, trainer, pl_module):
        reduce = pl_module.reduce_losses
        pl_module.reduce_losses = lambda losses, batch: reduce(self.spoilt(losses), batch)
        if self.kind == "gradient":
            self.a_weight(pl_module).register_hook(self.spoilt)

    def spoilt(self, values):
        """Return a loss, or a gradient, of which one element is not finite."""
        wanted = ("gradient",) if values.ndim > 1 else ("loss", "loss alone")
        if not self.is_on or self.kind not in wanted:
            return values
        is_first = torch.zeros_like(values, dtype=torch.bool)
        is_first.view(-1)[0] = True
        if self.kind == "loss":
            return values * torch.where(is_first, self.value, 1.0)
        return torch.where(is_first, self.value, values)

    def a_weight(self, module):
        return next(w for w in trainable_parameters(module).values() if w.ndim > 1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        # Of several micro-batches the first goes wrong.
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        is_its = trainer.global_rank == self.rank and trainer.global_step in self.steps
        self.is_on = is_first and is_its

    def on_after_backward(self, trainer, pl_module):
        if self.is_on and self.kind == "averaged gradient":
            local(self.a_weight(pl_module).grad).view(-1)[:1] = self.value


class ByHand(Callback):
    """Keep the optimizer from one step, and the averages too."""

    def __init__(self):
        super().__init__()
        self.means = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == BAD_STEP:
            self.means = [one.mean.clone() for one in learnt_directions(pl_module)]
            trainer.optimizers[0].step = lambda closure=None: closure and closure()
            pl_module.ema.update = lambda module: None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == BAD_STEP + 1:
            for one, mean in zip(learnt_directions(pl_module), self.means, strict=True):
                one.mean = mean
            vars(trainer.optimizers[0]).pop("step", None)
            vars(pl_module.ema).pop("update", None)


def learnt_directions(module):
    """Return the moving averages in a module's reward, if it has one."""
    reward = getattr(module, "reward", None) or nn.Module()
    return [one for one in reward.modules() if isinstance(one, EmaDirection)]


def digest(tensor):
    """Describe the bits of a tensor, of a sharded one those of this rank."""
    return hashlib.sha256(local(tensor).contiguous().numpy().tobytes()).hexdigest()


class Snapshots(Callback):
    """The bits of all that a step may change: before the bad one, after it, and at the end."""

    def __init__(self):
        self.found = {}

    def take(self, name, trainer, module):
        optimizer, tensors = trainer.optimizers[0], {}
        for key, weight in trainable_parameters(module).items():
            tensors[f"weight {key}"] = weight.detach()
            for moment, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{moment} {key}"] = value
        for number, one in enumerate(learnt_directions(module)):
            tensors[f"direction {number}"] = one.mean.clone()
        tensors |= {f"ema {key}": value for key, value in module.ema.weights.items()}
        self.found[name] = {key: digest(value) for key, value in tensors.items()}
        self.found[f"{name}: numbers"] = {
            "updates": module.ema.num_updates,
            "lr": optimizer.param_groups[0]["lr"],
            "step": trainer.global_step,
        }

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == BAD_STEP and "before" not in self.found:
            self.take("before", trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == BAD_STEP + 1 and "after" not in self.found:
            self.take("after", trainer, pl_module)
            skipped = pl_module.skipped
            self.found["skipped"] = skipped and skipped.record()

    def on_train_end(self, trainer, pl_module):
        self.take("end", trainer, pl_module)


class Fails(nn.Module):
    """How bright images are; NaN for the first image of one rank at one step."""

    def __init__(self, *, is_on):
        super().__init__()
        self.is_on, self.step = is_on, -1

    def set_step(self, step):
        self.step = step

    def forward(self, images, captions):
        values = images.mean(dim=(1, 2, 3))
        if self.is_on and self.step == BAD_STEP and os.environ["LOCAL_RANK"] == "1":
            values = values * torch.nan
        return values


@dataclass(frozen=True)
class FailingReward:
    """A reward with a part that may fail."""

    part: nn.Module

    def load(self):
        parts = {"clip": ClipSource(EmaDirection).load(), "fails": self.part}
        return RewardMixture({name: WeightedReward(reward=one) for name, one in parts.items()})


def reward(kind):
    module = sharded_runs.reward(lora=sharded_runs.LORA)
    module.reward_source = FailingReward(Fails(is_on=kind == "reward"))
    return module


MODULES = {
    "line": lambda kind: LineModule(sharded_runs.ADAMW),
    "stage one": lambda kind: sharded_runs.stage_one(),
    "preference": lambda kind: sharded_runs.preference(),
    "scenes": lambda kind: sharded_runs.scenes(),
    "reward": reward,
}


def falling_rate(module):
    """Give a module a schedule that shows how many steps were counted."""
    module.make_lr_scheduler = partial(
        torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)
    )
    return module


def make(bad: Bad, root: Path) -> dict[str, Any]:
    """Fit a module, and return what this rank has seen."""
    torch.manual_seed(7)
    of_strategy = {"ddp": DDPStrategy, "sharded": ShardedStrategy}[bad.strategy]
    kind = bad.module if bad.module in ("preference", "scenes") else "image"
    micro = MICRO_BATCHES.get(bad.module, 1)
    module, watch = falling_rate(MODULES[bad.module](bad.kind)), Snapshots()
    spoil = Spoil(bad.rank, kind=bad.kind, value=bad.value)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=of_strategy(process_group_backend="gloo"),
        max_steps=NUM_STEPS,
        accumulate_grad_batches=micro,
        gradient_clip_val=None if bad.module == "reward" else sharded_runs.MAX_NORM,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        inference_mode=bad.strategy == "ddp",
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[EMA(), NonFiniteSteps(), ByHand() if bad.kind == "by_hand" else spoil, watch],
        default_root_dir=root,
    )
    trainer.fit(module, LineData() if bad.module == "line" else Single(kind, micro))
    logged = trainer.callback_metrics.get("train/skipped_steps")
    return watch.found | {"logged": None if logged is None else logged.item()}


class Single(sharded_runs.Steps):
    """Batches in float32, all of whose rows count."""

    def batch(self, step, rows):
        made = super().batch(step, rows)
        made["valid"] = torch.ones_like(made["valid"])
        return {
            name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in made.items()
        }


def make_all(bads: list[Bad], root: Path, broken: str | None = None) -> dict[Bad, list[dict]]:
    """Make runs on two ranks, one after the other; return for each what both ranks have seen.

    Args:
        bads: The runs.
        root: Where they may write.
        broken: ``module.function`` that breaks something in both processes first.
    """
    sharded_runs.OwnBase().load(), ClipSource().load()  # once, before processes part
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root.mkdir(parents=True, exist_ok=True)
    multiprocessing.start_processes(
        _of_one_rank, (bads, root, port, broken), nprocs=2, start_method="fork"
    )
    ranks = [torch.load(root / f"rank {rank}.pt", weights_only=True) for rank in range(2)]
    return {bad: list(found) for bad, *found in zip(bads, *ranks, strict=True)}


def _of_one_rank(rank, bads, root, port, broken):
    torch.set_num_threads(1)
    os.environ |= {
        "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if broken is not None:
        module, _, function = broken.rpartition(".")
        getattr(import_module(module), function)()
    torch.save([make(bad, root) for bad in bads], root / f"rank {rank}.pt")
    torch.distributed.destroy_process_group()


# For runs of commands


class Rows(IterableDataset):
    """An endless stream of batches for ``LineModule``."""

    def __init__(self, first, rank):
        self.first, self.rank = first, rank

    def __iter__(self):
        step = self.first
        while True:
            ids = [10 * step + 2 * self.rank, 10 * step + 2 * self.rank + 1]
            yield {
                "x": counter_normal("line data", [(one,) for one in ids], (3,)),
                "sample_ids": torch.tensor(ids),
                "valid": torch.ones(2, dtype=torch.bool),
            }
            step += 1


class LineData(pl.LightningDataModule):
    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def train_dataloader(self):
        first = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(Rows(first, self.trainer.global_rank), batch_size=None)


class LineModule(TrainingModule):
    """A line through points: the smallest training module."""

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None = None
    ):
        super().__init__(optimizer, lr_scheduler)
        self.head: nn.Module | None = None

    def configure_model(self):
        if self.head is None:
            self.head = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        losses = (self.head(batch["x"]).squeeze(-1) - batch["x"].sum(-1)).square()
        loss = self.reduce_losses(losses, batch)
        self.log("train/loss", loss.detach())
        return loss
