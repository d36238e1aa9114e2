"""Scenes as a source of samples, and the folders of shards that a config asks for."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from filelock import FileLock

from segalign.atomic import make_directory
from segalign.data.packing import pack
from segalign.data.sources import Members, to_json, to_png
from segalign.errors import ConfigError

Length = Literal["short", "long", "very_long"]
EditPosition = Literal["any", "past_77", "within_77"]
Split = Literal["train", "val"]
_SPLITS: Final[tuple[Split, ...]] = ("train", "val")
_VALIDATION_START = 1 << 40


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How preference pairs of scenes are made.

    Attributes:
        edit_position: Where the sentence that states the edited fact first may stand.
        tie_share: Share of pairs whose two pictures are equal, in [0, 1].
    """

    edit_position: EditPosition = "any"
    tie_share: float = 0.0


def pair_settings(
    *, pairs: bool, edit_position: EditPosition, tie_share: float
) -> PairSettings | None:
    """Return the settings of pairs, or None if none are made.

    Raises:
        ConfigError: If there are settings of pairs and no pairs.
    """
    if pairs:
        return PairSettings(edit_position=edit_position, tie_share=tie_share)
    if edit_position != "any" or tie_share:
        raise ConfigError(
            f"`edit_position` and `tie_share` are for pairs of scenes; got `{edit_position}` and "
            f"{tie_share} without `pairs`; set it or remove them"
        )
    return None


class SceneSource:
    """Pictures and captions of the scenes benchmark.

    Args:
        world: Name of a world.
        count: Number of samples.
        seed: Names the stream of scenes.
        start: First index of the stream.
        length: Length class of the captions.
        pairs: Make preference pairs: the true picture and one with a stated fact edited.

    Raises:
        ConfigError: If there is no such world, ``count`` is not positive, or the settings of the
            pairs cannot be met.
    """

    def __init__(
        self,
        world: str,
        count: int,
        *,
        seed: int = 0,
        start: int = 0,
        length: Length = "long",
        pairs: PairSettings | None = None,
    ) -> None:
        if count < 1:
            raise ConfigError(f"the number of scenes must be at least 1; got {count}; raise it")
        self._world = world
        self._count = count
        self._seed = seed
        self._start = start
        self._length: Length = length
        self._pairs = pairs
        self._probe = hashlib.sha256(b"".join(raw for _, raw in self.members(0))).hexdigest()

    def __len__(self) -> int:
        return self._count

    def settings(self) -> dict[str, Any]:
        """See ``Source``; the first sample stands for the renderer and the grammar."""
        settings = {
            "kind": "scenes",
            "world": self._world,
            "count": self._count,
            "seed": self._seed,
            "start": self._start,
            "length": self._length,
            "content": self._probe,
        }
        return settings if self._pairs is None else {**settings, "pairs": asdict(self._pairs)}

    def origin(self, index: int) -> str:
        """See ``Source``."""
        return f"scene {self._start + index}"

    def members(self, index: int) -> Members:
        """See ``Source``."""
        if self._pairs is not None:
            return self._pair_members(index, self._pairs)
        # Imported here: packing images must not pay for importing torch.
        from segalign.scenes.samples import make_sample  # noqa: PLC0415

        sample = make_sample(self._world, self._seed, self._start + index, length=self._length)
        fields = {"caption": sample.caption, **sample.metadata}
        return [("png", to_png(sample.image)), ("json", to_json(fields))]

    def _pair_members(self, index: int, pairs: PairSettings) -> Members:
        from segalign.scenes.pairs import make_pair  # noqa: PLC0415

        place = (self._world, self._seed, self._start + index)
        pair = make_pair(*place, length=self._length, **asdict(pairs))
        fields = {
            "caption": pair.caption,
            "preference_probs": pair.preference_probs,
            **pair.metadata,
        }
        first, second = map(to_png, pair.images)
        return [("0.png", first), ("1.png", second), ("json", to_json(fields))]


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
        pairs: Make preference pairs: the true picture, and one with one stated shape, colour or
            size changed, in random places.
        edit_position: Where a caption states the changed fact first: anywhere, or within or past
            the 77 positions of a CLIP encoder. Pairs only.
        tie_share: Share of the training pairs whose two pictures are equal, in [0, 1]; validation
            has none. Pairs only.
    """

    world: str = "3x3"
    num_train: int = 20_000
    num_val: int = 512
    seed: int = 0
    length: Length = "long"
    val_length: Length = "long"
    root: str = "data/scenes"
    samples_per_shard: int = 2_000
    pairs: bool = False
    edit_position: EditPosition = "any"
    tie_share: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings of pairs where none are made."""
        self._pair_settings(self.tie_share)

    def check_use(self, content: str, *, other_shards: Sequence[str | None]) -> None:
        """Refuse settings of a datamodule that these shards do not go with.

        Args:
            content: What it reads: ``image``, ``caption`` or ``preference``.
            other_shards: Shards that it names besides.

        Raises:
            ConfigError: If they contradict each other.
        """
        if any(other_shards):
            raise ConfigError(
                "`data.scenes` brings its own shards, so `train_shards` and `val_shards` must be "
                "unset; got both; remove one"
            )
        if content != "caption" and (content == "preference") != self.pairs:
            raise ConfigError(
                f"`data.content: preference` goes with `data.scenes.pairs: true` and `image` with "
                f"`false`; got `{content}` and `{str(self.pairs).lower()}`; change one of them"
            )

    def source(self, split: Split) -> SceneSource:
        """Return the source of one split.

        Raises:
            ConfigError: If there is no such world.
        """
        if split == "train":
            return SceneSource(
                self.world,
                self.num_train,
                seed=self.seed,
                length=self.length,
                pairs=self._pair_settings(self.tie_share),
            )
        return SceneSource(
            self.world,
            self.num_val,
            seed=self.seed,
            start=_VALIDATION_START,
            length=self.val_length,
            pairs=self._pair_settings(0.0),
        )

    def _pair_settings(self, tie_share: float) -> PairSettings | None:
        return pair_settings(
            pairs=self.pairs, edit_position=self.edit_position, tie_share=tie_share
        )

    def folder(self, split: Split) -> Path:
        """Return where one split lies; another setting or another renderer is another folder."""
        settings = {**self.source(split).settings(), "samples_per_shard": self.samples_per_shard}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        kind = f"{settings['length']}-pairs" if self.pairs else settings["length"]
        return Path(self.root) / f"{self.world}-{split}-{kind}-{digest[:10]}"

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
