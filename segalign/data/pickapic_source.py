"""A source in the layout of Pick-a-Pic v1 and v2: Parquet with the bytes of two images a row.

Rows are streamed: only a few of them are in memory.
"""

from typing import Any, Final

import pyarrow as pa

from segalign.data.captions import Ties, check_caption, check_tie, parse_preference
from segalign.data.faults import SampleFault
from segalign.data.images import decode_image, open_image, sniff_suffix
from segalign.data.long_captions import LongCaptions
from segalign.data.parquet_rows import ParquetRows, digest_stamps, to_python
from segalign.data.sources import ImageCheck, Members, to_json_member

_ROWS_PER_BATCH: Final = 8
_IMAGES: Final = ("jpg_0", "jpg_1")
_LABELS: Final = ("label_0", "label_1")


class PickapicSource:
    """Rows with ``jpg_0``, ``jpg_1``, ``label_0``, ``label_1`` and ``caption``.

    Other columns of scalars are metadata. The labels are the probabilities that the images are
    preferred: (1, 0), (0, 1), or (0.5, 0.5) for a tie, which the data set marks by ``has_label``
    false.

    Args:
        path: A Parquet file, a folder of them at any depth, or a glob pattern.
        captions: Long captions that replace the prompts.
        ties: Whether ties are packed; PickScore trains on them and evaluates without.
        check: How far each image is decoded before it is packed.

    Raises:
        DataError: If there is no such file, one is no Parquet file or lacks a column, or there
            are no rows.
        ConfigError: If the captions' key is no column.
    """

    def __init__(
        self,
        path: str,
        *,
        captions: LongCaptions | None = None,
        ties: Ties = "keep",
        check: ImageCheck = "header",
    ) -> None:
        required = [*_IMAGES, *_LABELS, "caption"]
        self._rows = ParquetRows(path, required=required, rows_per_batch=_ROWS_PER_BATCH)
        if captions is not None:
            captions.check_key(set(self._rows.columns) - set(_IMAGES))
        self._captions = captions
        self._ties: Ties = ties
        self._check: ImageCheck = check
        self._content = digest_stamps(self._rows.files)

    def __len__(self) -> int:
        return len(self._rows)

    def settings(self) -> dict[str, Any]:
        """See ``Source``; the content is known by names, sizes and times of change."""
        return {
            "kind": "pickapic",
            "check": self._check,
            "ties": self._ties,
            "content": self._content,
            **(self._captions.settings() if self._captions is not None else {}),
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return self._rows.origin(index)

    def members(self, index: int) -> Members:
        """See ``Source``; rows in ascending order are read without going back."""
        row = self._rows.read(index)
        fields = {name: to_python(name, row[name]) for name in row if name not in _IMAGES}
        fields["preference_probs"] = list(_read_preference(fields, self._ties))
        if self._captions is not None:
            fields = self._captions.join(fields)
        fields["caption"] = check_caption(fields["caption"])
        images = [_read_image(name, row[name], self._check) for name in _IMAGES]
        return [*images, to_json_member(fields)]


def _read_preference(fields: dict[str, Any], ties: Ties) -> tuple[float, float]:
    labels = [fields[name] for name in _LABELS]
    if None in labels:
        raise SampleFault("preference_missing", "the row has no finite label")
    probs = parse_preference({"preference_probs": labels})
    return check_tie(probs, ties)


def _read_image(name: str, scalar: pa.Scalar, check: ImageCheck) -> tuple[str, bytes]:
    """Return suffix and bytes of an image column: bytes, or a struct that holds them."""
    value = scalar.as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if not content:
        raise SampleFault("image_missing", f"`{name}` is empty")
    if not isinstance(content, bytes):
        raise SampleFault("image_unreadable", f"`{name}` is {type(content).__name__}, not bytes")
    if check == "header":
        open_image(content)
    elif check == "full":
        decode_image(content)
    return f"{name[-1]}.{sniff_suffix(content)}", content
