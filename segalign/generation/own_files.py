"""Which files of an image folder are those of ``main.py generate``: only they are ever touched."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image

from segalign.atomic import make_directory, storage_errors
from segalign.errors import ConfigError, StorageError
from segalign.json_text import parse_json

RECORDS_FILE = "images.jsonl"
SHEET_FILE = "index.html"
# Stands in the head of the page: see its template.
SHEET_MARK = '<meta name="generator" content="segalign generate">'
# Every image says by this key which settings, prompt and seed made it.
FINGERPRINT = "fingerprint"

_LOCK_FILE = ".generate.lock"
_IMAGE_NAME = re.compile(r"\d{8,}-s\d+\.png")
# What a killed command leaves of a file: see `segalign.atomic`.
_STALE_NAME = re.compile(r"\.(\d{8,}-s\d+\.png|images\.jsonl|index\.html)\.tmp-[0-9a-f]{12}")
_MAX_HEAD_BYTES = 4096


def image_name(sample_id: int, seed: int) -> str:
    """Name the file of an image: numbers alone, never text of the prompt."""
    return f"{sample_id:08d}-s{seed}.png"


@contextlib.contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Keep a folder, which is made if it is missing, to one command.

    Raises:
        StorageError: If another command is at work in it, or it cannot be written.
    """
    make_directory(path)
    lock = FileLock(path / _LOCK_FILE)
    with storage_errors(path):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StorageError(
                f"expected to work in `{path}` alone; another `main.py generate` is at work in it. "
                "Wait for it, or choose another `--out`."
            ) from error
    try:
        yield
    finally:
        lock.release()


def check_own(path: Path) -> None:
    """Refuse a folder that holds files of other origin under the names that are written.

    Raises:
        ConfigError: If it does; nothing is changed.
    """
    for file in (path / RECORDS_FILE, path / SHEET_FILE, *image_files(path)):
        if file.exists() and not _is_own(file):
            raise ConfigError(
                f"expected `{file}` to be missing or made by `main.py generate`; it is of other "
                "origin. Move it away, or choose another `--out`."
            )


def remove_stale(path: Path) -> None:
    """Delete what killed commands left unfinished."""
    with storage_errors(path):
        for file in path.iterdir():
            if _STALE_NAME.fullmatch(file.name) and file.is_file():
                file.unlink()


def clear_images(path: Path) -> None:
    """Delete what earlier commands wrote into a folder, and nothing else.

    Raises:
        ConfigError: If files of other origin bear such names; then nothing is deleted.
    """
    check_own(path)
    with storage_errors(path):
        for file in (path / RECORDS_FILE, path / SHEET_FILE, *image_files(path)):
            file.unlink(missing_ok=True)


def image_files(path: Path) -> list[Path]:
    """List what is named as an image in a folder, by name."""
    if not path.is_dir():
        return []
    return sorted(file for file in path.iterdir() if _IMAGE_NAME.fullmatch(file.name))


def read_metadata(file: Path, *, whole: bool = True) -> Mapping[str, str]:
    """Read how an image was made; nothing if it is no PNG.

    Args:
        file: The image.
        whole: Give nothing either if its pixels are damaged.
    """
    try:
        with Image.open(file, formats=["PNG"]) as image:
            texts = {str(key): text for key, text in image.info.items() if isinstance(text, str)}
            if whole:
                image.verify()
    except (OSError, SyntaxError, ValueError):
        return {}
    return texts


def _is_own(file: Path) -> bool:
    """Tell whether a file was written here; an empty one has nothing to lose."""
    if not file.is_file():
        return False
    if file.stat().st_size == 0:
        return True
    if file.name == SHEET_FILE:
        with file.open("rb") as stream:
            return SHEET_MARK.encode() in stream.read(_MAX_HEAD_BYTES)
    if file.name == RECORDS_FILE:
        with file.open("rb") as stream:
            return _is_own_record(stream.readline())
    return FINGERPRINT in read_metadata(file, whole=False)


def _is_own_record(line: bytes) -> bool:
    try:
        record = parse_json(line)
        return bool(record["file"] == image_name(record["sample_id"], record["seed"]))
    except (ValueError, LookupError, TypeError):
        return False
