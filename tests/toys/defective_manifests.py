"""Defects of shards that have been indexed, and of their manifest."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from defective_shards import FIRST, cut_before_a_header, header_of_zeros
from defects import BAD, BAD_SHARD, SHARD_SIZE, Catalogue, Refused, SetAside, Usable, key_of, tar_of

from segalign.data.manifest import MANIFEST_NAME, load_manifest, write_manifest
from segalign.data.tarfiles import Member, Sample, ShardIndex, index_shard

CATALOGUE = Catalogue()
add = CATALOGUE.add


def in_place(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / BAD_SHARD
    path.write_bytes(change(path.read_bytes()))


def flip(folder: Path, suffix: str) -> None:
    sample = load_manifest(folder).samples(1)[BAD - FIRST]
    (found,) = [member for member in sample.members if member.suffix == suffix]
    at = found.offset + found.size // 2
    in_place(folder, lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])


@add("indexed", SetAside("checksum"))
def flipped_bit_in_an_image(folder: Path) -> None:
    flip(folder, "png")


@add("indexed", SetAside("checksum"))
def flipped_bit_in_a_caption(folder: Path) -> None:
    flip(folder, "json")


@add("indexed", Usable())
def header_of_zeros_after_the_index(folder: Path) -> None:
    in_place(folder, header_of_zeros)  # which nobody reads any more


@add("indexed", SetAside("checksum", SHARD_SIZE))
def other_shard_of_equal_size(folder: Path) -> None:
    in_place(folder, lambda raw: bytes(len(raw)))


@add("indexed", Refused("bytes by the manifest"))
def cut_after_the_index(folder: Path) -> None:
    in_place(folder, cut_before_a_header)


@add("indexed", Refused("must be there"))
def shard_that_is_missing(folder: Path) -> None:
    (folder / BAD_SHARD).unlink()


@add("indexed", Usable())
def shard_without_samples(folder: Path) -> None:
    (folder / "shard-9.tar").write_bytes(tar_of([]))
    reindex(folder, lambda indices: None)


def reindex(folder: Path, change: Callable[[list[ShardIndex]], Any]) -> None:
    """Write the manifest anew, sound but for what ``change`` does to it."""
    indices = [index_shard(path) for path in sorted(folder.glob("*.tar"))]
    change(indices)
    write_manifest(folder, indices)


@add("indexed", SetAside("read_error"))
def member_that_lies_behind_the_end(folder: Path) -> None:
    def move(indices: list[ShardIndex]) -> None:
        place = BAD - FIRST
        indices[1].samples[place] = Sample(key_of(BAD), (Member("png", 10**9, 100, 0),))

    reindex(folder, move)


@add("indexed", SetAside("member_too_large"))
def member_of_a_terabyte(folder: Path) -> None:
    def inflate(indices: list[ShardIndex]) -> None:
        place = BAD - FIRST
        indices[1].samples[place] = Sample(key_of(BAD), (Member("png", 512, 10**12, 0),))

    reindex(folder, inflate)


@add("indexed", Refused("whole numbers"))
def member_at_a_place_that_is_no_number(folder: Path) -> None:
    def misplace(indices: list[ShardIndex]) -> None:
        members: Any = (Member("png", "512", 100, 0),)  # type: ignore[arg-type]
        indices[1].samples[0] = Sample(key_of(FIRST), members)

    reindex(folder, misplace)


@add("indexed", Refused("is listed twice"))
def shard_listed_twice(folder: Path) -> None:
    reindex(folder, lambda indices: indices.append(indices[0]))


def change_manifest(folder: Path, change: Callable[[dict[str, Any], list[bytes]], Any]) -> None:
    path = folder / MANIFEST_NAME
    header, *lines = path.read_bytes().splitlines(keepends=True)
    fields = json.loads(header)
    change(fields, lines)
    path.write_bytes(json.dumps(fields).encode() + b"\n" + b"".join(lines))


@add("indexed", Refused("digest"))
def manifest_of_another_digest(folder: Path) -> None:
    change_manifest(folder, lambda fields, _: fields["shards"][1].update(sha256="0" * 64))


@add("indexed", Refused("digest"))
def manifest_of_another_number_of_samples(folder: Path) -> None:
    change_manifest(folder, lambda fields, _: fields["shards"][1].update(num_samples=5))


@add("indexed", Refused("has 5 samples"))
def manifest_with_a_line_of_fewer_samples(folder: Path) -> None:
    def shorten(fields: dict[str, Any], lines: list[bytes]) -> None:
        line = json.loads(lines[1])
        line["keys"].pop()
        line["members"].pop()
        raw = json.dumps(line).encode()
        lines[1] = raw + b" " * (len(lines[1]) - len(raw) - 1) + b"\n"
        fields["shards"][1].update(line_crc32=zlib.crc32(lines[1]), line_size=len(lines[1]))
        ends = [0, len(lines[0]), len(lines[0]) + len(lines[1])]
        for shard, offset in zip(fields["shards"], ends, strict=True):
            shard["line_offset"] = offset

    change_manifest(folder, shorten)


@add("indexed", Refused("does not match its checksum"))
def manifest_with_a_damaged_line(folder: Path) -> None:
    def damage(_: dict[str, Any], lines: list[bytes]) -> None:
        lines[1] = lines[1].replace(key_of(BAD).encode(), b"another")[: len(lines[1])]

    change_manifest(folder, damage)


@add("indexed", Refused("sound manifest"))
def manifest_of_garbage(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(b"[" * 100_000)


@add("indexed", Refused("no plain file name"))
def manifest_that_leads_outside(folder: Path) -> None:
    change_manifest(folder, lambda fields, _: fields["shards"][1].update(name="../x.tar"))
