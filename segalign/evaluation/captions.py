"""The captions that an evaluation draws, the same list on every rank."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from segalign.data.loaders import BatchSettings, eval_loader, open_shards
from segalign.data.order import BatchPlan
from segalign.errors import DataError
from segalign.ranks import gather_objects, together

_READ_AT_ONCE = 512


class CaptionRow(TypedDict):
    """One caption; plain data, so that a checkpoint or a process group can carry it.

    Attributes:
        sample_id: Position of the sample in the manifest.
        caption: The caption.
        metadata: Other fields of the sample's JSON member.
    """

    sample_id: int
    caption: str
    metadata: dict[str, Any]


def read_caption_rows(shards: Path, count: int | None) -> list[CaptionRow]:
    """Read the first captions of a folder of shards, in manifest order; no image is decoded.

    Args:
        shards: Folder with a manifest.
        count: How many samples are looked at; None is all.

    Returns:
        Those that could be read.

    Raises:
        DataError: If the folder has no manifest, or none of its captions can be read.
    """
    plan = BatchPlan(global_batch_size=_READ_AT_ONCE, world_size=1, global_rank=0, accumulate=1)
    loader = eval_loader(open_shards(shards), plan, BatchSettings(content="caption"), limit=count)
    rows: list[CaptionRow] = [
        {"sample_id": sample_id, "caption": caption, "metadata": metadata}
        for batch in loader
        for sample_id, caption, metadata, valid in zip(
            batch["sample_ids"].tolist(),
            batch["captions"],
            batch["metadata"],
            batch["valid"].tolist(),
            strict=True,
        )
        if valid
    ]
    if not rows:
        raise DataError(
            f"expected captions in `{shards}` to evaluate on; none of them can be read; run "
            "`main.py shards verify` on the folder"
        )
    return rows


def read_same_captions(shards: Path, count: int | None) -> list[CaptionRow]:
    """Read captions as ``read_caption_rows`` does; every rank must call it.

    Raises:
        DataError: If the ranks have not read the same, or one of them has read none.
    """
    rows = together(lambda: read_caption_rows(shards, count))
    digests = gather_objects(captions_digest(rows))
    other = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
    if other is not None:
        raise DataError(
            f"expected the same captions in `{shards}` for every process; process {other} has read "
            "others than process 0; give all of them the same shards"
        )
    return rows


def captions_digest(rows: Sequence[CaptionRow]) -> str:
    """Digest sample ids and captions, SHA-256 in hexadecimal: equal for equal prompts."""
    text = json.dumps([[row["sample_id"], row["caption"]] for row in rows], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
