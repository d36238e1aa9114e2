"""The real images that generated ones are compared with: those of the validation shards."""

from typing import Any

import lightning.pytorch as pl

from callbacks.outcome_log import evaluation_folder
from segalign.errors import ConfigError
from segalign.metrics.reference import ReferenceImages
from segalign.metrics.reference_files import is_file


def real_images(
    trainer: pl.Trainer,
    reference: str | None,
    image_size: int | None,
    count: int | None,
    *,
    keep_rows: bool = True,
) -> ReferenceImages:
    """Name the real images; nothing is read yet.

    Args:
        trainer: Its datamodule has the validation shards; its run directory keeps statistics where
            the shards cannot.
        reference: Other shards, or a file of ``main.py stats``.
        image_size: Side in pixels; None is the datamodule's, or whatever a file has.
        count: How many; None is all.
        keep_rows: Whether features of each image are needed. They are kept, too, where another
            callback needs them, so that the images are looked at once for both.

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
    path = str(found)
    size = image_size or (None if is_file(path) else getattr(datamodule, "image_size", None))
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return ReferenceImages(
        path,
        image_size=size,
        count=count,
        keep_rows=keep_rows or any(getattr(one, "needs_rows", False) for one in callbacks),
        cache=str(evaluation_folder(trainer)),
    )
