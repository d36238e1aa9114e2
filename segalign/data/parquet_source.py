"""A source in the layout of the LongAlign data set: Parquet with captions and paths of images.

Rows are streamed: of millions of them only one batch is in memory.
"""

import re
from pathlib import Path
from typing import Any, Final

from segalign.data.captions import check_caption
from segalign.data.jsonl_sources import existing_root, image_below
from segalign.data.parquet_rows import ParquetRows, digest_contents, to_python
from segalign.data.sources import ImageCheck, Members, to_json_member

_ROWS_PER_BATCH: Final = 512
_PARAGRAPH_BREAK: Final = re.compile(r"\n\s*\n\s*")


class ParquetSource:
    """Rows with the columns ``caption`` and ``path``; other columns of scalars are metadata.

    Args:
        path: A Parquet file, a folder of them at any depth, or a glob pattern.
        image_root: Folder that every ``path`` is relative to and must stay in; None packs
            captions alone.
        check: How far each image is decoded before it is packed.

    Raises:
        DataError: If there is no such file, one is no Parquet file or lacks a column, or there
            are no rows.
    """

    def __init__(
        self, path: str, *, image_root: Path | None = None, check: ImageCheck = "header"
    ) -> None:
        self._root = None if image_root is None else existing_root(image_root)
        self._check = check
        required = ["caption"] if self._root is None else ["caption", "path"]
        self._rows = ParquetRows(path, required=required, rows_per_batch=_ROWS_PER_BATCH)
        self._content = digest_contents(self._rows.files)

    def __len__(self) -> int:
        return len(self._rows)

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        return {
            "kind": "longalign",
            "check": self._check,
            "images": self._root is not None,
            "content": self._content,
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return self._rows.origin(index)

    def members(self, index: int) -> Members:
        """See ``Source``; rows in ascending order are read without going back."""
        row = self._rows.read(index)
        fields = {name: to_python(name, value) for name, value in row.items()}
        fields["caption"] = clean_caption(check_caption(fields["caption"]))
        images = []
        if self._root is not None:
            images = [image_below(self._root, fields["path"], self._check)]
        return [*images, to_json_member(fields)]


def clean_caption(caption: str) -> str:
    """Turn paragraph breaks into one blank.

    The official code deletes them in training captions and so glues the words around them together.
    """
    return " ".join(part.rstrip() for part in _PARAGRAPH_BREAK.split(caption))
