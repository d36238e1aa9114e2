"""Photographs made of noise, and the ways of loading them that ``data_loading.py`` compares."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import transforms

from datamodules.long_caption import LongCaptionDataModule
from segalign.data.images import decode_image
from segalign.data.manifest import Manifest, write_manifest
from segalign.data.packing import pack
from segalign.data.sources import FolderSource
from segalign.data.tarfiles import ShardWriter

SIZES = ((640, 512), (768, 1024), (1024, 768), (512, 640), (800, 600), (960, 720))
WORDS = ["wide", "quiet", "harbour", "dusk", "red", "boats", "tall", "cranes", "stone", "pier"]
NUM_WORDS = 120


def photograph(number: int, scale: float = 1.0) -> Image.Image:
    """Draw noise whose spectrum falls as that of photographs does, brighter than coloured."""
    draws = np.random.default_rng(number)
    width, height = (round(length * scale) for length in SIZES[number % len(SIZES)])
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.sqrt(rows**2 + columns**2)
    frequency[0, 0] = np.inf

    def field(slope: float) -> Any:
        waves = draws.normal(size=(2, *frequency.shape)) / frequency**slope
        values = np.fft.irfft2(waves[0] + 1j * waves[1], s=(height, width))
        return values / values.std()

    light = 50 * field(1.2) + 128
    pixels = np.stack([light + 18 * field(1.4) for _ in range(3)], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def caption(number: int) -> str:
    """Write a caption of ``NUM_WORDS`` words."""
    draws = np.random.default_rng(number)
    return " ".join(draws.choice(WORDS, NUM_WORDS)) + f", number {number}."


def write_files(folder: Path, count: int, scale: float = 1.0) -> None:
    """Write photographs as JPEG files of quality 90 with captions beside them."""
    folder.mkdir(parents=True)
    for number in range(count):
        photograph(number, scale).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(caption(number))


def write_many(files: Path, folder: Path, num_shards: int, num_samples: int) -> Manifest:
    """Write a shard of files again and again, and list it under many names, which are links."""
    paths = sorted(files.glob("*.jpg"))
    folder.mkdir()
    first = folder / "shard-000000.tar"
    with first.open("wb") as file:
        writer = ShardWriter(file, first.name)
        for number in range(num_samples):
            path = paths[number % len(paths)]
            text = path.with_suffix(".txt").read_bytes()
            writer.write(f"{number:09d}", [("jpg", path.read_bytes()), ("txt", text)])
        index = writer.finish()
    names = [first.name, *(f"shard-{number:06d}.tar" for number in range(1, num_shards))]
    for name in names[1:]:
        os.link(first, folder / name)
    return write_manifest(folder, [replace(index, name=name) for name in names])


@dataclass(frozen=True, kw_only=True)
class Work:
    """The same work for every way of loading.

    Attributes:
        files: Folder of files.
        shards: The same, packed.
        side: Pixels of the square results.
        batch_size: Samples of a batch.
        num_workers: Worker processes.
    """

    files: Path
    shards: Path
    side: int
    batch_size: int
    num_workers: int

    @classmethod
    def make(cls, folder: Path, count: int, scale: float, **settings: Any) -> "Work":
        """Make the photographs, and eight shards of them."""
        write_files(folder / "files", count, scale)
        source = FolderSource(folder / "files")
        pack(source, folder / "shards", samples_per_shard=-(-count // 8))
        return cls(files=folder / "files", shards=folder / "shards", **settings)

    def loader(self, dataset: Any, batch_size: int | None = None, **options: Any) -> Any:
        """Make PyTorch's loader; without a batch size the dataset makes the batches."""
        return DataLoader(dataset, batch_size, num_workers=self.num_workers, **options)


# Ours


def datamodule(work: Work, **settings: Any) -> LongCaptionDataModule:
    """Set up the datamodule of every stage, without a trainer."""
    made = LongCaptionDataModule(
        train_shards=str(work.shards),
        image_size=work.side,
        global_batch_size=work.batch_size,
        num_workers=work.num_workers,
        **settings,
    )
    made.setup("fit")
    return made


def from_datamodule(work: Work) -> Iterator[Any]:
    """Load as a training does, accounts included."""
    module = datamodule(work)
    return (module.on_before_batch_transfer(batch, 0) for batch in module.train_dataloader())


# Decoding alone


def plain_decode(raw: bytes, side: int) -> Image.Image:
    """Decode, resize and crop with Pillow, as reduced in scale as its decoder can."""
    image = Image.open(io.BytesIO(raw))
    image.draft("RGB", (side, side))
    return cropped_after(image, side)


def cropped_after(image: Image.Image, side: int) -> Image.Image:
    """Resize the whole image, its short side to this many pixels, and then cut out the centre."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


class DecodedOnly(IterableDataset[int]):
    """Decodes files that lie in memory, in every worker, and delivers how many.

    Args:
        work: What to decode.
        decode: Called with the bytes of a file and the side.
    """

    def __init__(self, work: Work, decode: Callable[[bytes, int], object]) -> None:
        self.work, self.decode = work, decode
        self.files = [path.read_bytes() for path in sorted(work.files.glob("*.jpg"))]

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        place = self.work.batch_size * (worker.id if worker else 0)
        while True:
            for _ in range(self.work.batch_size):
                self.decode(self.files[place % len(self.files)], self.work.side)
                place += 1
            place += self.work.batch_size * (self.work.num_workers - 1 if worker else 0)
            yield self.work.batch_size


def decoding(work: Work, decode: Callable[[bytes, int], object]) -> Iterator[Any]:
    """Decode and do nothing else."""
    return iter(work.loader(DecodedOnly(work, decode)))


# Loaders as they are usually written


def usual_transform(side: int) -> Any:
    """Compose the usual transform: resize the short side, crop the centre, floats in [0, 1]."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(side, bicubic), transforms.CenterCrop(side), transforms.ToTensor()]
    return transforms.Compose(steps)


class MapFiles(Dataset[tuple[torch.Tensor, str]]):
    """One file after the other, by Pillow and torchvision."""

    def __init__(self, work: Work) -> None:
        self.paths = sorted(work.files.glob("*.jpg"))
        self.transform = usual_transform(work.side)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, str]:
        path = self.paths[number]
        with Image.open(path) as image:
            pixels = self.transform(image.convert("RGB"))
        return pixels, path.with_suffix(".txt").read_text()


def map_style(work: Work) -> Iterator[Any]:
    """Load files in a random order, epoch after epoch."""
    loader = work.loader(
        MapFiles(work),
        work.batch_size,
        shuffle=True,
        drop_last=True,
        persistent_workers=work.num_workers > 0,
    )
    while True:
        yield from loader


def plain_webdataset(work: Work) -> Iterator[Any]:
    """Load the same shards by webdataset's own stages."""
    urls = [str(path) for path in sorted(work.shards.glob("*.tar"))]
    stages = webdataset.WebDataset(urls, shardshuffle=8, seed=0, empty_check=False)
    stages = stages.repeat().shuffle(100).decode("pil").to_tuple("jpg", "txt")
    stages = stages.map_tuple(usual_transform(work.side), str).batched(work.batch_size)
    return iter(work.loader(stages))


DATAMODULE, BARE = "datamodule", "bare decode, resize and crop"
ARMS: dict[str, Callable[[Work], Iterator[Any]]] = {
    BARE: partial(decoding, decode=plain_decode),
    "`decode_image` alone": partial(decoding, decode=decode_image),
    DATAMODULE: from_datamodule,
    "map style, Pillow and torchvision": map_style,
    "plain webdataset": plain_webdataset,
}
