"""Keep a moving average of the trained weights while training."""

from typing import Any

import lightning.pytorch as pl
from jsonargparse.typing import ClosedUnitInterval
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from segalign.ema import TrainableEMA
from segalign.skipped_steps import is_left_out


class EMA(Callback):
    """Average the trainable weights after every optimizer step.

    The average is ``pl_module.ema`` (a ``TrainableEMA``); it is saved as ``ema.safetensors``.
    Evaluation never sees it unless it asks, with ``pl_module.ema.swapped(pl_module)``.

    Args:
        decay: Upper bound of the decay, in [0, 1).
        warmup: Use ``min(decay, (1 + n) / (10 + n))`` at the n-th update.
    """

    def __init__(self, decay: ClosedUnitInterval = 0.999, warmup: bool = True) -> None:
        super().__init__()
        self.decay = decay
        self.warmup = warmup
        self._ema: TrainableEMA | None = None
        self._seen_step = 0

    def _attach(self, pl_module: pl.LightningModule) -> TrainableEMA:
        if self._ema is None:
            self._ema = TrainableEMA(pl_module, self.decay, warmup=self.warmup)
        # Not through nn.Module's own registry: an average is no submodule.
        object.__setattr__(pl_module, "ema", self._ema)
        return self._ema

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the initial weights, unless a checkpoint has brought an average."""
        self._attach(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count optimizer steps from here."""
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update once for each optimizer step that changed anything, not for each micro-batch."""
        if trainer.global_step > self._seen_step:
            self._seen_step = trainer.global_step
            if not is_left_out(pl_module):
                self._attach(pl_module).update(pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the average beside the raw weights; all ranks come here."""
        if self._ema is not None:
            checkpoint["ema"] = self._ema.state_dict()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over a stored average; without one, averaging starts from the loaded weights."""
        if "ema" in checkpoint:
            self._attach(pl_module).load_state_dict(checkpoint["ema"])
