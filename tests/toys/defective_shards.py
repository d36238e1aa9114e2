"""Defects of a shard before it is indexed, and while it is read."""

import contextlib
import errno
import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from defects import (
    BAD,
    SHARD_SIZE,
    Catalogue,
    Refused,
    SetAside,
    Usable,
    good_members,
    key_of,
    tar_of,
)

CATALOGUE = Catalogue()
add = CATALOGUE.add
FIRST = SHARD_SIZE  # number of the bad shard's first sample
CUT = Refused("must be")


def offsets(raw: bytes) -> list[int]:
    """Return where the headers of a sound tar begin."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        return [info.offset for info in archive]


def repacked(change: Callable[[tarfile.TarInfo], Any]) -> Callable[[bytes], bytes]:
    """Write the members anew; ``change`` may alter the header of the bad sample's image."""

    def repack(raw: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(raw)) as old, tarfile.open(None, "w", buffer) as new:
            for info in old:
                content = old.extractfile(info)
                if info.name == f"{key_of(BAD)}.png":
                    change(info)
                new.addfile(info, content)
        return buffer.getvalue()

    return repack


def samples() -> list[tuple[str, Any]]:
    return [(key_of(number), good_members(number)) for number in range(FIRST, FIRST + SHARD_SIZE)]


# The tar, before it is indexed


@add("shard", Refused("no end mark"))
def cut_before_a_header(raw: bytes) -> bytes:
    return raw[: offsets(raw)[5]]


@add("shard", CUT)
def cut_inside_a_header(raw: bytes) -> bytes:
    return raw[: offsets(raw)[5] + 200]


@add("shard", CUT)
def cut_inside_a_body(raw: bytes) -> bytes:
    return raw[: offsets(raw)[5] + 520]


@add("shard", Refused("damaged"))
def header_with_a_bad_checksum(raw: bytes) -> bytes:
    at = offsets(raw)[5] + 3
    return raw[:at] + b"~" + raw[at + 1 :]


@add("shard", Refused("damaged"))
def header_of_zeros(raw: bytes) -> bytes:
    at = offsets(raw)[5]
    return raw[:at] + bytes(512) + raw[at + 512 :]


@add("shard", Refused("damaged"))
def last_header_of_zeros(raw: bytes) -> bytes:
    at = offsets(raw)[-1]
    return raw[:at] + bytes(512) + raw[at + 512 :]


@add("shard", Refused("damaged"))
def garbage_between_members(raw: bytes) -> bytes:
    at = offsets(raw)[5]
    return raw[:at] + b"garbage!" * 128 + raw[at:]


@add("shard", Refused("damaged"))
def garbage_after_the_end(raw: bytes) -> bytes:
    return raw + b"garbage!" * 128


@add("shard", Refused("empty file"))
def shard_of_no_bytes(_: bytes) -> bytes:
    return b""


@add("shard", CUT)
def shard_that_is_compressed(raw: bytes) -> bytes:
    return gzip.compress(raw)


@add("shard", Refused("in two places"))
def key_in_two_places(_: bytes) -> bytes:
    found = samples()
    return tar_of([*found, (found[0][0], [("txt", b"again")])])


@add("shard", Refused("two members"))
def sample_twice_in_a_row(_: bytes) -> bytes:
    found = samples()
    return tar_of([found[0], *found])


@add("shard", SetAside("image_missing"))
def member_without_a_suffix(raw: bytes) -> bytes:
    return repacked(lambda info: setattr(info, "name", key_of(BAD)))(raw)


def linked(kind: bytes) -> Callable[[bytes], bytes]:
    def link(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    return repacked(link)


@add("shard", Refused("a link"))
def symbolic_link(raw: bytes) -> bytes:
    return linked(tarfile.SYMTYPE)(raw)


@add("shard", Refused("a link"))
def hard_link(raw: bytes) -> bytes:
    return linked(tarfile.LNKTYPE)(raw)


@add("shard", Refused("a device"))
def device(raw: bytes) -> bytes:
    return linked(tarfile.CHRTYPE)(raw)


@add("shard", Usable())
def names_that_lead_outside(_: bytes) -> bytes:
    return tar_of([(f"../../../tmp/{key}", members) for key, members in samples()])


@add("shard", Usable())
def absolute_names(_: bytes) -> bytes:
    return tar_of([(f"/tmp/{key}", members) for key, members in samples()])


# While it is read: entered after the first batch


@add("reading", SetAside("checksum", None))
@contextlib.contextmanager
def overwritten_while_it_is_read(folder: Path) -> Iterator[None]:
    for path in folder.glob("*.tar"):
        with path.open("r+b") as file:
            file.write(b"?" * path.stat().st_size)
    yield


@add("reading", SetAside("checksum", None))
@contextlib.contextmanager
def replaced_while_it_is_read(folder: Path) -> Iterator[None]:
    # Renamed over an open one, which stays whole for those that have it open.
    for path in folder.glob("*.tar"):
        (folder / "new").write_bytes(bytes(path.stat().st_size))
        (folder / "new").replace(path)
    yield


@add("reading", SetAside("read_error", None))
@contextlib.contextmanager
def cut_while_it_is_read(folder: Path) -> Iterator[None]:
    for path in folder.glob("*.tar"):
        os.truncate(path, 700)
    yield


@add("reading", SetAside("read_error", None))
@contextlib.contextmanager
def disk_that_fails(folder: Path) -> Iterator[None]:
    with mock.patch.object(os, "pread", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
        yield


@add("reading", Usable())
@contextlib.contextmanager
def handle_that_is_stale_once(folder: Path) -> Iterator[None]:
    read, failed = os.pread, []

    def fail_once(*arguments: Any) -> bytes:
        if not failed:
            failed.append(True)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(*arguments)

    with mock.patch.object(os, "pread", fail_once):
        yield
