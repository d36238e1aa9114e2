"""What training modules share: optimizers and exact means over valid samples."""

import contextlib
from typing import Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from segalign.diffusion.generator import Weights
from segalign.ema import TrainableEMA
from segalign.errors import ConfigError
from segalign.trainable import trainable_parameters
from segalign.types import CaptionBatch


class TrainingModule(pl.LightningModule):
    """Base of the training modules.

    A loss is the sum over the valid samples of an optimizer step, over all ranks and micro-batches,
    divided by their number. Micro-batches divide by their own size; the gradient is corrected
    before the optimizer step, in the rare step that has invalid samples.

    Args:
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.
    """

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.strict_loading = False
        self.ema: TrainableEMA | None = None
        self._num_samples = 0
        self._num_valid: Tensor | None = None

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(list(trainable_parameters(self).values()))
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @override
    def train(self, mode: bool = True) -> Self:
        """Switch modes, but for parts that are wholly frozen: those always evaluate."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def reduce_losses(self, losses: Tensor, valid: Tensor) -> Tensor:
        """Reduce per-sample losses ``(B,)`` for backward, and count the valid ones."""
        count = valid.sum()
        self._num_samples += len(valid)
        self._num_valid = count if self._num_valid is None else self._num_valid + count
        return torch.where(valid, losses, 0).sum() / len(valid)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the mean over all samples into the mean over valid ones."""
        if self._num_valid is None:
            return
        num_valid = self.trainer.strategy.reduce(self._num_valid.float(), reduce_op="sum")
        assert isinstance(num_valid, Tensor)
        num_samples = self._num_samples * self.trainer.world_size
        for parameter in trainable_parameters(self).values():
            if parameter.grad is not None:
                # Two whole numbers, so that the correction is exact in the gradient's own dtype.
                parameter.grad.mul_(num_samples).div_(num_valid.clamp(min=1))
        self._num_samples, self._num_valid = 0, None

    def log_train(self, name: str, value: Tensor, batch: CaptionBatch) -> None:
        """Log a training value, also on the progress bar."""
        self.log(f"train/{name}", value, prog_bar=True, batch_size=len(batch["valid"]))

    def weights(self, which: Weights) -> contextlib.AbstractContextManager[None]:
        """Use the raw or the averaged weights for the duration of a block.

        Raises:
            ConfigError: If there is no average.
        """
        if which == "raw":
            return contextlib.nullcontext()
        if self.ema is None:
            raise ConfigError(
                "expected averaged weights for `ema`; the run keeps none. Add callbacks.ema.EMA."
            )
        return self.ema.swapped(self)
