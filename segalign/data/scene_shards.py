"""Scenes as a source of samples, and the folders of shards that a config asks for."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from filelock import FileLock

from segalign.atomic import make_directory
from segalign.data.packing import pack
from segalign.data.sources import Members, to_json, to_png
from segalign.errors import ConfigError

Length = Literal["short", "long", "very_long"]
Split = Literal["train", "val"]
_SPLITS: Final[tuple[Split, ...]] = ("train", "val")
_VALIDATION_START = 1 << 40


class SceneSource:
    """Pictures and captions of the scenes benchmark.

    Args:
        world: Name of a world.
        count: Number of samples.
        seed: Names the stream of scenes.
        start: First index of the stream.
        length: Length class of the captions.

    Raises:
        ConfigError: If there is no such world or ``count`` is not positive.
    """

    def __init__(
        self, world: str, count: int, *, seed: int = 0, start: int = 0, length: Length = "long"
    ) -> None:
        if count < 1:
            raise ConfigError(f"the number of scenes must be at least 1; got {count}; raise it")
        self._world = world
        self._count = count
        self._seed = seed
        self._start = start
        self._length: Length = length
        self._probe = hashlib.sha256(b"".join(raw for _, raw in self.members(0))).hexdigest()

    def __len__(self) -> int:
        return self._count

    def settings(self) -> dict[str, Any]:
        """See ``Source``; the first sample stands for the renderer and the grammar."""
        return {
            "kind": "scenes",
            "world": self._world,
            "count": self._count,
            "seed": self._seed,
            "start": self._start,
            "length": self._length,
            "content": self._probe,
        }

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return f"scene {self._start + index}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        # Imported here: packing images must not pay for importing torch.
        from segalign.scenes.samples import make_sample  # noqa: PLC0415

        sample = make_sample(self._world, self._seed, self._start + index, length=self._length)
        fields = {"caption": sample.caption, **sample.metadata}
        return [("png", to_png(sample.image)), ("json", to_json(fields))]


@dataclass(frozen=True, kw_only=True)
class ScenesShards:
    """Shards of scenes that the datamodule makes itself.

    Attributes:
        world: Name of a world.
        num_train: Training samples.
        num_val: Validation samples; their scenes are other ones than those of training.
        seed: Names the stream of scenes.
        length: Length class of the training captions.
        val_length: Length class of the validation captions.
        root: Folder below which the shards are kept, one sub-folder per setting.
        samples_per_shard: Samples of one shard.
    """

    world: str = "3x3"
    num_train: int = 20_000
    num_val: int = 512
    seed: int = 0
    length: Length = "long"
    val_length: Length = "long"
    root: str = "data/scenes"
    samples_per_shard: int = 2_000

    def source(self, split: Split) -> SceneSource:
        """Return the source of one split.

        Raises:
            ConfigError: If there is no such world.
        """
        if split == "train":
            return SceneSource(self.world, self.num_train, seed=self.seed, length=self.length)
        return SceneSource(
            self.world,
            self.num_val,
            seed=self.seed,
            start=_VALIDATION_START,
            length=self.val_length,
        )

    def folder(self, split: Split) -> Path:
        """Return where one split lies; another setting or another renderer is another folder."""
        settings = {**self.source(split).settings(), "samples_per_shard": self.samples_per_shard}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return Path(self.root) / f"{self.world}-{split}-{settings['length']}-{digest[:10]}"

    def prepare(self) -> None:
        """Pack the splits that are not there yet; other processes may try the same.

        Raises:
            ConfigError: If there is no such world.
            StorageError: If ``root`` cannot be written.
        """
        make_directory(Path(self.root))
        for split in _SPLITS:
            folder = self.folder(split)
            with FileLock(f"{folder}.lock"):
                pack(
                    self.source(split),
                    folder,
                    samples_per_shard=self.samples_per_shard,
                    title=f"scenes ({split})",
                )
