"""Small images, folders of them, and shards."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segalign.data.manifest import Manifest, write_manifest
from segalign.data.tarfiles import ShardWriter


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def plain_image(colour=(200, 30, 60), size=(8, 8), kind="PNG", **options) -> bytes:
    return encode(Image.new("RGB", size, colour), kind, **options)


def write_shards(folder: Path, sizes: list[int], members=None) -> Manifest:
    """Write shards of the given numbers of samples; sample i has the caption ``caption i``."""
    folder.mkdir(parents=True, exist_ok=True)
    indices, count = [], 0
    for number, size in enumerate(sizes):
        name = f"shard-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            writer = ShardWriter(file, name)
            for _ in range(size):
                writer.write(f"{count:06d}", (members or default_members)(count))
                count += 1
            indices.append(writer.finish())
    return write_manifest(folder, indices)


def default_members(number: int):
    pixel = plain_image((number % 256, 0, 0), (4, 4))
    return [("png", pixel), ("json", json.dumps({"caption": f"caption {number}"}).encode())]


def image_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png", compress_level=1)
        (folder / f"{number:05d}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(name="encode")
def encode_fixture():
    return encode


@pytest.fixture(name="plain_image")
def plain_image_fixture():
    return plain_image


@pytest.fixture(name="write_shards")
def write_shards_fixture():
    return write_shards


@pytest.fixture(name="image_folder")
def image_folder_fixture():
    return image_folder
