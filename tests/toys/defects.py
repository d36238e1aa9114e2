"""Folders of shards with one defect each, and what must come of it.

A folder has three shards of six samples: an 8 x 8 picture of one colour and a caption, or pairs.
The defect is in the second shard, in its third sample where it is in one sample.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NUM_SHARDS, SHARD_SIZE, SIDE = 3, 6, 8
NUM_SAMPLES = NUM_SHARDS * SHARD_SIZE
BAD = 8
BAD_SHARD = "shard-1.tar"
Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Refused:
    """The index, or the run before its first step, ends with one line that holds this text."""

    text: str


@dataclass(frozen=True)
class SetAside:
    """Samples are set aside for this reason; as many as this, or any number from 1 on."""

    reason: str
    count: int | None = 1


@dataclass(frozen=True)
class Usable:
    """No sample is lost, and the picture that was changed is read as these pixels.

    Attributes:
        pixels: RGB in [0, 255], of the changed sample; None leaves it as it was.
        tolerance: Largest difference of a value.
    """

    pixels: Any = None
    tolerance: float = 1.5


@dataclass(frozen=True)
class Defect:
    """One kind of defect.

    Attributes:
        name: Of the function that makes it.
        stage: ``member`` changes one sample's members, ``shard`` the bytes of a shard that is then
            indexed, ``indexed`` a folder with its manifest, ``reading`` a folder while it is read.
        damage: What does it; takes and returns members or bytes, or takes the folder.
        expected: What must come of it.
        content: What the samples hold.
    """

    name: str
    stage: str
    damage: Callable[[Any], Any]
    expected: Refused | SetAside | Usable
    content: str = "image"


@dataclass
class Catalogue:
    """Collects defects as they are defined."""

    defects: list[Defect] = field(default_factory=list)

    def add(self, stage: str, expected: Any, content: str = "image") -> Callable[[Any], Any]:
        def register(damage: Callable[[Any], Any]) -> Callable[[Any], Any]:
            self.defects.append(Defect(damage.__name__, stage, damage, expected, content))
            return damage

        return register


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(colour: tuple[int, int, int], kind: str = "PNG", **options: Any) -> bytes:
    return encode(Image.new("RGB", (SIDE, SIDE), colour), kind, **options)


def colour_of(number: int) -> tuple[int, int, int]:
    return (10 * number + 5, 200 - 10 * number, 77)


def flat(*colour: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), colour, dtype=np.uint8)


def good_members(number: int, content: str = "image") -> Members:
    image = picture(colour_of(number))
    if content == "image":
        return [("png", image), ("json", json.dumps({"caption": f"caption {number}"}).encode())]
    fields = {"caption": f"caption {number}", "preference_probs": [1, 0]}
    other = picture((0, 0, number))
    return [("0.png", image), ("1.png", other), ("json", json.dumps(fields).encode())]


def key_of(number: int) -> str:
    return f"{number:06d}"


def tar_of(samples: Iterable[tuple[str, Members]]) -> bytes:
    """Write a tar as others do, from keys and members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, members in samples:
            for suffix, content in members:
                info = tarfile.TarInfo(f"{key}.{suffix}" if suffix else key)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_folder(folder: Path, defect: Defect) -> None:
    """Write shards without a manifest, with the defect if it is one of members or of a shard."""
    folder.mkdir(parents=True)
    for shard in range(NUM_SHARDS):
        samples = []
        for number in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE):
            members = good_members(number, defect.content)
            if number == BAD and defect.stage == "member":
                members = defect.damage(members)
            samples.append((key_of(number), members))
        raw = tar_of(samples)
        if f"shard-{shard}.tar" == BAD_SHARD and defect.stage == "shard":
            raw = defect.damage(raw)
        (folder / f"shard-{shard}.tar").write_bytes(raw)
