"""Where samples to pack come from: the protocol of a source, and folders of images.

A source lists its samples up front and reads each on demand, in any process.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segalign.data.captions import MAX_JSON_BYTES, read_caption
from segalign.data.faults import SampleFault
from segalign.data.images import IMAGE_SUFFIXES, decode_image, open_image
from segalign.errors import DataError

Members: TypeAlias = list[tuple[str, bytes]]
ImageCheck: TypeAlias = Literal["none", "header", "full"]
_OTHER_IMAGES = ("avif", "bmp", "gif", "heic", "jp2", "tif", "tiff")


class Source(Protocol):
    """A list of samples that can be packed."""

    def __len__(self) -> int:
        """Number of samples, the faulty ones included."""
        ...

    def settings(self) -> dict[str, Any]:
        """JSON-able settings and a digest of the content; equal for equal shards."""
        ...

    def origin(self, index: int) -> str:
        """Name one sample for a report."""
        ...

    def members(self, index: int) -> Members:
        """Return suffix and bytes of a sample's members; raises ``SampleFault``."""
        ...


class FolderSource:
    """Images anywhere below a folder, each with ``NAME.txt`` or ``NAME.json`` beside it.

    Args:
        folder: The root.
        check: How far each image is decoded before it is packed.

    Raises:
        DataError: If there is no folder or no image in it.
    """

    def __init__(self, folder: Path, *, check: ImageCheck = "header") -> None:
        if not folder.is_dir():
            raise DataError(f"a folder of images was expected; `{folder}` is none; check the path")
        self._folder = folder
        self._check = check
        self._files = files = sorted(_walk(folder))
        names = set(files)
        images = {name for name in files if suffix_of(name) in (*IMAGE_SUFFIXES, *_OTHER_IMAGES)}
        stems = {_stem(name) for name in images}
        self._names = [
            name
            for name in files
            if name in images or (_is_caption(name, names) and _stem(name) not in stems)
        ]
        if not images:
            raise DataError(
                f"`{folder}` must hold images ({', '.join(IMAGE_SUFFIXES)}); it has none; "
                f"check the path"
            )

    def __len__(self) -> int:
        return len(self._names)

    def settings(self) -> dict[str, Any]:
        """See ``Source``; the content is known by names, sizes and times of change."""
        digest = hashlib.sha256()
        for name in self._files:
            status = os.lstat(f"{self._folder}/{name}")
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return {"kind": "folder", "check": self._check, "content": digest.hexdigest()}

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return self._names[index]

    def members(self, index: int) -> Members:
        """See ``Source``."""
        name = self._names[index]
        stem, suffix = _stem(name), suffix_of(name)
        if suffix in _OTHER_IMAGES:
            raise SampleFault("image_format", f"`{suffix}` is none of {', '.join(IMAGE_SUFFIXES)}")
        if suffix not in IMAGE_SUFFIXES:
            raise SampleFault("image_missing", f"no image beside `{name}`")
        captions = {
            kind: _read(path, "caption_missing")
            for kind in ("txt", "json")
            if (path := self._folder / f"{stem}.{kind}").is_file()
        }
        caption, metadata = read_caption(captions)
        image = (plain_suffix(suffix), read_image_file(self._folder / name, self._check))
        if "json" in captions:
            return [image, ("json", to_json({"caption": caption, **metadata}))]
        return [image, ("txt", caption.encode())]


def read_image_file(path: Path, check: ImageCheck) -> bytes:
    """Read an image file and see whether it can be decoded, as far as ``check`` asks.

    Raises:
        SampleFault: If it is missing or unreadable.
    """
    raw = _read(path, "image_missing")
    if check == "header":
        open_image(raw)
    elif check == "full":
        decode_image(raw)
    return raw


def to_json(fields: dict[str, Any]) -> bytes:
    """Write a ``.json`` member."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def to_json_member(fields: dict[str, Any]) -> tuple[str, bytes]:
    """Return a ``.json`` member that readers accept.

    Raises:
        SampleFault: If it holds a lone surrogate or is larger than ``MAX_JSON_BYTES``.
    """
    try:
        content = to_json(fields)
    except UnicodeEncodeError as err:
        raise SampleFault("json_invalid", "a field holds a lone surrogate") from err
    if len(content) > MAX_JSON_BYTES:
        raise SampleFault("json_invalid", f"{len(content)} bytes, at most {MAX_JSON_BYTES}")
    return "json", content


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode RGB pixels ``(H, W, 3)`` without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(parent).relative_to(folder).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        yield from (prefix + name for name in files if not name.startswith("."))


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def suffix_of(name: str) -> str:
    """Return what follows the last dot, in lower case."""
    return name.rpartition(".")[2].lower()


def plain_suffix(suffix: str) -> str:
    """Return the suffix as shards spell it."""
    return "jpg" if suffix == "jpeg" else suffix


def _is_caption(name: str, names: set[str]) -> bool:
    """Tell whether a file is its stem's caption (of ``.txt`` and ``.json`` only the first)."""
    return name.endswith(".txt") or (name.endswith(".json") and f"{_stem(name)}.txt" not in names)


def _read(path: Path, missing: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as err:
        raise SampleFault(missing, f"there is no `{path.name}`") from err
    except OSError as err:
        raise SampleFault("read_error", f"`{path.name}`: {err.strerror}") from err
