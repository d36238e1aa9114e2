"""Train on one batch only, to see whether a model can learn at all."""

import copy
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class OneBatch(Callback):
    """Replace every training batch by the first one of this attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, Any] | None = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Overwrite the batch in place, since a callback cannot hand over another."""
        if self._first is None:
            self._first = copy.copy(batch)
        batch.clear()
        batch.update(self._first)
