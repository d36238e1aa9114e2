"""The first validation captions of a run, shared out over its ranks."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from segalign.errors import ConfigError
from segalign.evaluation.captions import CaptionRow
from segalign.ranks import gather_objects
from segalign.types import CaptionBatch

_KEPT_METADATA = ("world", "facts")


def read_first_captions(trainer: pl.Trainer, count: int) -> list[CaptionRow]:
    """Read the first validation captions, the same list on every rank; all ranks must call it.

    Args:
        trainer: Its datamodule has the captions.
        count: How many; fewer if there are fewer.

    Raises:
        ConfigError: If there are none.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    loaders = [] if datamodule is None else datamodule.val_dataloader()
    own: list[CaptionRow] = []
    for loader in (loaders if isinstance(loaders, list) else [loaders])[:1]:
        for batch in loader:
            own += _valid_rows(batch)
            if len(own) * trainer.world_size >= count:
                break
    rows = [row for part in gather_objects(own) for row in part]
    if not rows:
        raise ConfigError(
            "expected validation captions for a report; the data have none. Set "
            "`data.val_shards`, or remove the callback."
        )
    return sorted(rows, key=lambda row: row["sample_id"])[:count]


def own_places(trainer: pl.Trainer, count: int) -> range:
    """Say which of ``count`` rows are this rank's: equally many on every rank.

    The last ones may be ``count`` or more: those are padding.
    """
    padded = -(-count // trainer.world_size) * trainer.world_size
    return range(trainer.global_rank, padded, trainer.world_size)


def have_facts(rows: Sequence[CaptionRow]) -> bool:
    """Tell whether all captions state facts of scenes."""
    return all(name in row["metadata"] for row in rows for name in _KEPT_METADATA)


def _valid_rows(batch: CaptionBatch) -> list[CaptionRow]:
    columns = (batch["sample_ids"].tolist(), batch["captions"], batch["metadata"])
    return [
        {
            "sample_id": sample_id,
            "caption": caption,
            "metadata": {name: metadata[name] for name in _KEPT_METADATA if name in metadata},
        }
        for valid, sample_id, caption, metadata in zip(
            batch["valid"].tolist(), *columns, strict=True
        )
        if valid
    ]
