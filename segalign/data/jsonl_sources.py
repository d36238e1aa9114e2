"""Sources that list their samples in a JSONL file: image-caption pairs, captions, preferences."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segalign.data.captions import check_caption, parse_json_object, parse_preference
from segalign.data.faults import SampleFault
from segalign.data.images import IMAGE_SUFFIXES
from segalign.data.sources import (
    ImageCheck,
    Members,
    plain_suffix,
    read_image_file,
    suffix_of,
    to_json_member,
)
from segalign.errors import DataError


@dataclass(frozen=True)
class Lines:
    """Lines of a text file by their byte offsets, blank ones left out."""

    path: Path
    offsets: NDArray[np.int64]
    digest: str

    def __getitem__(self, index: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            return file.readline()


class JsonlSource:
    """One JSON object per line: ``caption`` and, with an image root, ``path``.

    Args:
        path: The JSONL file.
        image_root: Folder that every ``path`` is relative to and must stay in; None packs
            captions alone.
        check: How far each image is decoded before it is packed.

    Raises:
        DataError: If the file cannot be read or is empty, or its lines have a ``path`` and no
            image root is given.
    """

    def __init__(
        self, path: Path, *, image_root: Path | None = None, check: ImageCheck = "header"
    ) -> None:
        self._lines = index_lines(path)
        self._root = None if image_root is None else existing_root(image_root)
        self._check = check
        if self._root is None and b'"path"' in self._lines[0]:
            raise DataError(
                f"the lines of `{path}` have a `path`, so an image root was expected; got none; "
                f"give `--image-root`"
            )

    def __len__(self) -> int:
        return len(self._lines.offsets)

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        return {
            "kind": "jsonl",
            "check": self._check,
            "images": self._root is not None,
            "content": self._lines.digest,
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return f"line at byte {self._lines.offsets[index]}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        fields = parse_json_object(self._lines[index])
        fields["caption"] = check_caption(fields.get("caption"))
        if self._root is None:
            return [to_json_member(fields)]
        return [
            image_below(self._root, fields.get("path"), self._check),
            to_json_member(fields),
        ]


class PreferenceSource:
    """One JSON object per line: ``path_0``, ``path_1``, ``caption`` and a preference.

    Args:
        path: The JSONL file; the preference is ``preference_probs: [p0, p1]`` or ``label``, the
            index of the preferred image (0.5 for a tie).
        image_root: Folder that the paths are relative to and must stay in.
        check: How far each image is decoded before it is packed.

    Raises:
        DataError: If the file cannot be read or is empty.
    """

    def __init__(self, path: Path, *, image_root: Path, check: ImageCheck = "header") -> None:
        self._lines = index_lines(path)
        self._root = existing_root(image_root)
        self._check = check

    def __len__(self) -> int:
        return len(self._lines.offsets)

    def settings(self) -> dict[str, Any]:
        """See ``Source``."""
        return {"kind": "preferences", "check": self._check, "content": self._lines.digest}

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return f"line at byte {self._lines.offsets[index]}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        fields = parse_json_object(self._lines[index])
        fields["caption"] = check_caption(fields.get("caption"))
        fields["preference_probs"] = list(parse_preference(fields))
        images = []
        for place in ("0", "1"):
            suffix, content = image_below(self._root, fields.get(f"path_{place}"), self._check)
            images.append((f"{place}.{suffix}", content))
        return [*images, to_json_member(fields)]


def image_below(root: Path, name: object, check: ImageCheck) -> tuple[str, bytes]:
    """Read the image that a line names; it must lie below the root.

    Raises:
        SampleFault: If the name is missing or leads out of the root, or the image is not usable.
    """
    if not isinstance(name, str) or not name:
        raise SampleFault("image_missing", "the line names no image")
    if "\0" in name or not (path := (root / name).resolve()).is_relative_to(root):
        raise SampleFault("path_outside_root", f"{name!r:.100} leads out of the image root")
    suffix = suffix_of(name)
    if suffix not in IMAGE_SUFFIXES:
        raise SampleFault("image_format", f"`{name:.100}` is none of {', '.join(IMAGE_SUFFIXES)}")
    return plain_suffix(suffix), read_image_file(path, check)


def existing_root(root: Path) -> Path:
    """Return the absolute path of a folder of images.

    Raises:
        DataError: If it is no folder.
    """
    if not root.is_dir():
        raise DataError(f"the image root must be a folder; `{root}` is none; check the path")
    return root.resolve()


def index_lines(path: Path) -> Lines:
    """Find the lines of a JSONL file.

    Raises:
        DataError: If it cannot be read or is empty.
    """
    digest, offsets, offset = hashlib.sha256(), [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(offset)
                offset += len(line)
                digest.update(line)
    except OSError as err:
        raise DataError(
            f"a JSONL file was expected at `{path}`; got: {err.strerror}; check the path"
        ) from err
    if not offsets:
        raise DataError(f"`{path}` must hold one JSON object per line; it is empty; check it")
    return Lines(path, np.asarray(offsets, dtype=np.int64), digest.hexdigest())
