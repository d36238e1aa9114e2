"""The real images that generated ones are compared with: those of the validation shards."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from segalign.errors import ConfigError
from segalign.metrics.reference import ReferenceImages


def real_images(
    trainer: pl.Trainer, reference: str | None, image_size: int | None, count: int | None
) -> ReferenceImages:
    """Name the real images; nothing is read yet.

    Args:
        trainer: Its datamodule has the validation shards; its run directory keeps statistics where
            the shards cannot.
        reference: Other shards, or a file of ``main.py stats``.
        image_size: Side in pixels; None is the datamodule's.
        count: How many; None is all.

    Raises:
        ConfigError: If there are none.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    found = reference or getattr(datamodule, "val_shards", None)
    if not found:
        raise ConfigError(
            "expected real images to compare generated ones with; got neither `reference` nor "
            "`data.val_shards`. Set one of them."
        )
    size = image_size or getattr(datamodule, "image_size", None)
    cache = Path(trainer.default_root_dir) / "evaluation"
    return ReferenceImages(str(found), image_size=size, count=count, cache=str(cache))
