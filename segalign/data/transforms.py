"""Turn raw samples into rows and rows into batches, on the workers.

A raw sample is a dict as webdataset's stages pass it: ``__key__``, ``__url__``, ``__index__``
(sample id), ``__epoch__``, ``__position__`` and the bytes of the members by suffix; ``__fault__``
if it could not be read, ``__padding__`` if the slot holds no sample at all. Members of shards with
such names are not passed.

Dims: B batch, H and W pixels.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from segalign.data.captions import parse_preference, read_caption
from segalign.data.faults import FaultRecord, SampleFault
from segalign.data.images import IMAGE_SUFFIXES, decode_image
from segalign.errors import DataError
from segalign.rng import counter_uniform
from segalign.types import CaptionBatch, PreferenceBatch

Content: TypeAlias = Literal["image", "caption", "preference"]
RawSample: TypeAlias = dict[str, Any]
Row: TypeAlias = dict[str, Any]
PADDING_ID = -1
RESERVED = "__"


class DecodeRow:
    """Decode one raw sample to a row; a faulty sample becomes an empty row with its fault.

    Args:
        content: What a sample holds: an image and a caption, a caption alone, or two images with
            a caption and a preference.
        image_size: Side of the square images, in pixels; None keeps their size.
        expected_size: (H, W) that every image must have when ``image_size`` is None; images of a
            batch must be equal in size. None accepts what comes.
        caption_dropout: Share of captions replaced by ``""``, in [0, 1].
        seed: Seed of the caption dropout, which depends on (seed, epoch, sample id) alone.
        as_bytes: Leave images as arrays of uint8 in [0, 255], a quarter of the bytes; see
            ``to_unit_range``.
    """

    def __init__(
        self,
        content: Content,
        *,
        image_size: int | None = None,
        expected_size: tuple[int, int] | None = None,
        caption_dropout: float = 0.0,
        seed: int = 0,
        as_bytes: bool = False,
    ) -> None:
        self._content = content
        self._as_bytes = as_bytes
        self._image_size = image_size
        self._expected_size = expected_size
        self._caption_dropout = caption_dropout
        self._seed = seed

    def __call__(self, raw: RawSample) -> Row:
        """Return the row of one raw sample."""
        row: Row = {
            "sample_id": raw["__index__"],
            "epoch": raw["__epoch__"],
            "caption": "",
            "metadata": {},
            "valid": False,
        }
        if raw.get("__padding__"):
            return row
        try:
            if "__fault__" in raw:
                raise raw["__fault__"]
            row.update(self._decode(raw))
        except SampleFault as fault:
            row["fault"] = _record(raw, fault)
            return row
        row["valid"] = True
        if self._is_dropped(row):
            row["caption"] = ""
        return row

    def _decode(self, raw: RawSample) -> Row:
        caption, metadata = read_caption(raw)
        fields: Row = {"caption": caption, "metadata": metadata}
        if self._content == "image":
            fields["image"] = self._image(raw, "")
        if self._content == "preference":
            fields["preference_probs"] = parse_preference(metadata)
            first, second = self._image(raw, "0."), self._image(raw, "1.")
            if first.shape != second.shape:
                raise SampleFault("image_size", "the two images differ in size; set `image_size`")
            stack: Callable[[list[Any]], Any] = np.stack if self._as_bytes else torch.stack
            fields["image"] = stack([first, second])
        return fields

    def _image(self, raw: RawSample, prefix: str) -> Tensor | NDArray[np.uint8]:
        """Decode a member to float [0, 1], or to uint8, ``(3, H, W)``."""
        pixels = decode_image(read_image(raw, prefix), self._image_size)
        if self._expected_size is not None and pixels.shape[:2] != self._expected_size:
            raise SampleFault(
                "image_size",
                f"{pixels.shape[0]}x{pixels.shape[1]} pixels, the first image has "
                f"{self._expected_size[0]}x{self._expected_size[1]}; set `image_size`",
            )
        if self._as_bytes:
            return np.moveaxis(pixels, -1, 0)
        return _scaled(torch.tensor(pixels).permute(2, 0, 1))

    def _is_dropped(self, row: Row) -> bool:
        counters = (self._seed, row["epoch"], row["sample_id"])
        return (
            self._caption_dropout > 0
            and counter_uniform("caption_dropout", *counters) < self._caption_dropout
        )


def read_image(raw: RawSample, prefix: str = "") -> bytes:
    """Return the bytes of the image member (``PREFIX`` + ``jpg``, ``jpeg``, ``png`` or ``webp``).

    Raises:
        SampleFault: If there is none.
    """
    for suffix in IMAGE_SUFFIXES:
        content = raw.get(prefix + suffix)
        if content is not None:
            return cast("bytes", content)
    raise SampleFault(
        "image_missing", f"there is no `{prefix}jpg`, `{prefix}png` or `{prefix}webp`"
    )


def to_unit_range(batch: CaptionBatch | PreferenceBatch) -> CaptionBatch | PreferenceBatch:
    """Turn a batch's images to float [0, 1] where they are uint8 in [0, 255].

    Between processes a batch of bytes is passed on in a quarter of the time.
    """
    for name in ("images", "image_pairs"):
        if name in batch:
            fields = cast("dict[str, Tensor]", batch)
            fields[name] = _scaled(fields[name])
    return batch


def _scaled(images: Tensor) -> Tensor:
    """Return float [0, 1], laid out by rows, pinned if the bytes are; floats are returned."""
    if images.dtype == torch.uint8:
        scaled = torch.empty(images.shape, pin_memory=images.is_pinned())
        return scaled.copy_(images).div_(255)
    return images.contiguous()


class CollateRows:
    """Stack rows to a batch; the slots of invalid rows hold a zero image.

    Args:
        content: As in ``DecodeRow``.
        image_hw: (H, W) of the images if it is known; else that of the first valid row.
    """

    def __init__(self, content: Content, *, image_hw: tuple[int, int] | None = None) -> None:
        self._content = content
        self._image_hw = image_hw

    def __call__(self, rows: list[Row]) -> CaptionBatch | PreferenceBatch:
        """Return the batch of ``B`` rows."""
        batch: CaptionBatch = {
            "sample_ids": torch.tensor([row["sample_id"] for row in rows], dtype=torch.int64),
            "captions": [row["caption"] for row in rows],
            "valid": torch.tensor([row["valid"] for row in rows], dtype=torch.bool),
            "epochs": torch.tensor([row["epoch"] for row in rows], dtype=torch.int64),
            "metadata": [row["metadata"] for row in rows],
            "faults": [
                _in_row(row["fault"], place) for place, row in enumerate(rows) if "fault" in row
            ],
        }
        if self._content == "image":
            batch["images"] = self._stack_images(rows, ())
        if self._content != "preference":
            return batch
        probs = [row.get("preference_probs", (0.5, 0.5)) for row in rows]
        pairs: PreferenceBatch = {
            "sample_ids": batch["sample_ids"],
            "captions": batch["captions"],
            "valid": batch["valid"],
            "epochs": batch["epochs"],
            "metadata": batch["metadata"],
            "faults": batch["faults"],
            "image_pairs": self._stack_images(rows, (2,)),
            "preference_probs": torch.tensor(probs, dtype=torch.float32),
        }
        return pairs

    def _stack_images(self, rows: list[Row], leading: tuple[int, ...]) -> Tensor:
        images = [row["image"] for row in rows if "image" in row]
        if self._image_hw is not None:
            shape = (*leading, 3, *self._image_hw)
        else:
            shape = tuple(images[0].shape) if images else (*leading, 3, 1, 1)
        if any(image.shape != shape for image in images):
            sizes = sorted({tuple(image.shape[-2:]) for image in images})
            raise DataError(
                f"the images of a batch must be equal in size; got (H, W) {sizes[:3]}; "
                f"set `image_size`"
            )
        if images and images[0].dtype == np.uint8:
            # Colours last, as the decoder leaves them: turning them would be the workers' time.
            stacked = allocate((len(rows), *leading, *shape[-2:], 3), torch.uint8).movedim(-1, -3)
        else:
            stacked = allocate((len(rows), *shape), torch.float32)
        for slot, row in zip(stacked.numpy(), rows, strict=True):
            slot[...] = row.get("image", 0)
        return stacked


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory that is not filled; in a worker, as PyTorch's own collate does, shared memory.

    What lies there already need not be copied on the way to the main process.
    """
    empty = torch.empty(0, dtype=dtype)
    if get_worker_info() is None:
        return empty.new_empty(shape)
    size = math.prod(shape) * empty.element_size()
    storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return empty.set_(storage).view(shape)


def _record(raw: RawSample, fault: SampleFault) -> FaultRecord:
    return {
        "shard": raw["__url__"].rsplit("/", 1)[-1],
        "key": raw["__key__"],
        "offset": raw.get("__offset__", -1),
        "reason": fault.reason,
        "detail": fault.detail,
        "row": 0,
        "epoch": raw["__epoch__"],
        "position": raw.get("__position__", -1),
    }


def _in_row(fault: FaultRecord, row: int) -> FaultRecord:
    return {**fault, "row": row}
