"""Make stray random draws of a training step a function of the step."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from segalign.rng import counter_seed


class StepRng(Callback):
    """Seed PyTorch before every training batch from (seed, step, micro-batch, rank).

    Our own draws take their counters explicitly; this covers what libraries draw for themselves,
    such as dropout. So a resumed run draws what an uninterrupted one would, and an evaluation in
    between changes nothing.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed all devices."""
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        counters = (self._seed, trainer.global_step, micro_batch, trainer.global_rank)
        torch.manual_seed(counter_seed("training step", *counters))
