"""A callback that stores the images of each rank, as an evaluation would make them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file

CAPTIONS = ["A red fox. It sits on a wall!", "two owls"]


class ImageRecorder(Callback):
    """Generate the same images on every rank, after the test."""

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        images = pl_module.generate(CAPTIONS, [5, 6], 3, pl_module.best_weights)
        name = f"images-{trainer.global_rank}-of-{trainer.world_size}.safetensors"
        save_file({"images": images}, Path(trainer.default_root_dir) / name)
