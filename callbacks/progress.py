"""A progress bar that counts optimizer steps."""

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override


class StepProgressBar(TQDMProgressBar):
    """Show optimizer steps out of the steps to do, also over an endless loader or after a resume.

    Args:
        seconds: Shortest time between two updates on a terminal. A log file gets a tenth of them.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        super().__init__()
        self._seconds = seconds if sys.stdout.isatty() else 10 * seconds
        self._shown_at = -math.inf

    @override
    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_start(trainer)
        total = trainer.estimated_stepping_batches
        bar = self.train_progress_bar
        bar.total = None if math.isinf(total) else int(total)
        bar.initial = bar.n = trainer.global_step
        bar.set_description("Training")

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Leave the bar alone: it counts steps, not epochs."""

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update by the clock, so that reading metrics never costs a sync at every step."""
        if self.is_enabled and time.monotonic() - self._shown_at >= self._seconds:
            self._show(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the last step."""
        if self.is_enabled:
            self._show(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    @override
    def on_exception(self, *_: Any) -> None:
        """End the line of a bar that is cut off, so that what is said next has one of its own."""
        stages = ("train", "val", "test", "predict")
        bars = (getattr(self, f"_{stage}_progress_bar") for stage in stages)
        for bar in bars:
            if bar is not None:
                bar.close()

    def _show(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown_at = time.monotonic()
        bar = self.train_progress_bar
        bar.n = trainer.global_step
        bar.set_postfix(self.get_metrics(trainer, pl_module))

    @override
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Leave out Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
