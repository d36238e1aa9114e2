"""A grid of images for fixed captions and fixed noise, written while training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from typing_extensions import override

from segalign.data.loaders import first_captions
from segalign.diffusion.generator import Weights, as_generator
from segalign.errors import ConfigError
from segalign.pictures import Panel, panel_grid


class SampleGrid(Callback):
    """Write ``samples/step-XXXXXXXX.png`` in the run directory, each picture with its caption.

    Args:
        captions: What to draw; the first validation captions if null.
        num_samples: How many validation captions are used.
        every_n_steps: Optimizer steps between grids; there is one more at the start and the end.
        eval_seed: Seed of the images' noise.
        weights: ``raw`` or ``ema``.
        columns: Pictures in a row.
    """

    def __init__(
        self,
        captions: Sequence[str] | None = None,
        num_samples: PositiveInt = 8,
        every_n_steps: PositiveInt = 500,
        eval_seed: int = 1234,
        weights: Weights = "raw",
        columns: PositiveInt = 4,
    ) -> None:
        super().__init__()
        self.captions = list(captions) if captions else None
        self.num_samples = num_samples
        self.every_n_steps = every_n_steps
        self.eval_seed = eval_seed
        self.weights = weights
        self.columns = columns
        self._last_step = -1

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what the model makes before training, but not again after a resume."""
        if trainer.global_step == 0:
            self._draw(trainer, pl_module)
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Draw after every n-th optimizer step."""
        due = trainer.global_step % self.every_n_steps == 0
        if due and trainer.global_step != self._last_step:
            self._draw(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the final state."""
        if trainer.global_step != self._last_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        captions = self._captions(trainer)
        ids = list(range(len(captions)))
        images = as_generator(pl_module).generate(captions, ids, self.eval_seed, self.weights)
        panels = [
            Panel([image], [f"noise {key}"], caption)
            for image, key, caption in zip(images, ids, captions, strict=True)
        ]
        if trainer.is_global_zero:
            self._write(trainer, panel_grid(panels, columns=self.columns))

    def _captions(self, trainer: pl.Trainer) -> list[str]:
        """Take the first validation captions, the same on every rank."""
        if self.captions is None:
            shards = getattr(getattr(trainer, "datamodule", None), "val_shards", None)
            if not shards:
                raise ConfigError(
                    "expected `captions` for SampleGrid, or validation shards to take them from; "
                    "got neither. Set one of them."
                )
            self.captions = first_captions(Path(shards), self.num_samples)
        return self.captions

    def _write(self, trainer: pl.Trainer, picture: Image.Image) -> None:
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step-{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    "samples", np.asarray(picture), trainer.global_step, dataformats="HWC"
                )
