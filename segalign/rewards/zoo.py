"""CLIP-type rewards as configs name them; nothing is read before ``load``.

The defaults of a published scorer give its published scores, divided by 100 or by its temperature:
rewards are inner products of unit vectors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from segalign.errors import ConfigError
from segalign.formats.clip_scorer import ImageFit, ResizeFilter, Scorer
from segalign.formats.open_clip_scorer import load_open_clip_scorer, random_open_clip_scorer
from segalign.rewards.batch_directions import MIN_BATCH, BatchDirection
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.direction_checks import check_batch_estimate
from segalign.rewards.direction_settings import DirectionSource
from segalign.rewards.protocol import Reward
from segalign.rewards.scorer_source import CLIP_H, PretrainedScorer
from segalign.text.segmenter import Segmenter, SentenceSegmenter
from segalign.text.tokenizer import TextCleaning

TextPart = Literal["segments", "whole"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ClipSettings(ABC):
    """What is the same for all CLIP-type rewards.

    Args:
        text: Score every segment of a caption and take the mean, or score the ``whole`` caption,
            of which no more is read than fits the context.
        segmenter: Splitting strategy; null splits into sentences.
        renormalize: Scale the mean of segments to length 1 again.
        common_direction: Estimate of V; null leaves scores as they are.
        omega: Factor of the text-irrelevant part, in [0, 1]; the paper's best is 0.3.
        cleaning: Repair of texts: ``none``, ``ftfy`` or ``open_clip``; null is the model's own.
        resize: Filter, ``bicubic`` or ``bilinear`` (official); null is the model's own.
        crop: Side of the square that is cut out at a random place first (official: 504).
        seed: Seed of the crop.
        dtype: Precision of the weights; features of text are float32 at least.
        cache_megabytes: Bound on the memory of cached text features.
    """

    text: TextPart = "whole"
    segmenter: Segmenter | None = None
    renormalize: bool = False
    common_direction: DirectionSource | None = None
    omega: float = 1.0
    cleaning: TextCleaning | None = None
    resize: ResizeFilter | None = None
    crop: int | None = None
    seed: int = 0
    dtype: Precision = "float32"
    cache_megabytes: int = 64

    def __post_init__(self) -> None:
        """Check what can be checked without the weights."""
        _check_choice("text", self.text, get_args(TextPart))
        _check_choice("cleaning", self.cleaning, (None, *get_args(TextCleaning)))
        _check_choice("resize", self.resize, (None, *get_args(ResizeFilter)))
        _check_choice("dtype", self.dtype, get_args(Precision))
        if not 0 <= self.omega <= 1:
            raise ConfigError(
                f"expected `omega` in [0, 1]; got {self.omega}; the paper's best is 0.3"
            )
        if self.omega != 1 and self.common_direction is None:
            raise ConfigError(
                f"expected a `common_direction` for `omega: {self.omega}`; got none; name one, or "
                "leave `omega` out"
            )
        if self.segmenter is not None and self.text == "whole":
            raise ConfigError(
                "expected `text: segments` for a `segmenter`; got `text: whole`, which splits "
                "nothing; change one of them"
            )
        if self.crop is not None and self.crop < 1:
            raise ConfigError(
                f"expected `crop` of at least 1 pixel; got {self.crop}; 504 is official"
            )

    @abstractmethod
    def load_scorer(self) -> Scorer:
        """Read model, tokenizer and image settings."""

    def load(self) -> ClipReward:
        """Read the weights and make the reward; each call makes another, which shares nothing.

        Raises:
            ConfigError: If a file is not there, or a part cannot work with this model.
            DataError: If a file is damaged, or the common direction is another model's.
        """
        reward = ClipReward(
            self.load_scorer(),
            segmenter=(self.segmenter or SentenceSegmenter()) if self.text == "segments" else None,
            renormalize=self.renormalize,
            omega=self.omega,
            cleaning=self.cleaning,
            resize=self.resize,
            crop=self.crop,
            seed=self.seed,
            cache_bytes=self.cache_megabytes * 2**20,
        )
        if self.common_direction is not None:
            # How many captions a call has shows when it is called: a batch of one is refused then.
            reward.common_direction = self.common_direction.build(
                reward.scorer, num_captions=MIN_BATCH
            )
        reward.scorer.to(getattr(torch, self.dtype))
        return reward


@dataclass(frozen=True, kw_only=True)
class HuggingFaceClip(ClipSettings):
    """A ``CLIPModel`` of transformers: any hub id or folder.

    Args:
        model: Hub id or local folder; with ``init: random`` a size, ``vit-h-14`` or ``tiny``.
        init: ``pretrained`` reads weights; ``random`` makes them up, to measure or to try.
    """

    model: str = CLIP_H
    init: Literal["pretrained", "random"] = "pretrained"

    def load_scorer(self) -> Scorer:
        """See ``ClipSettings``."""
        return PretrainedScorer(model=self.model, init=self.init).load()


@dataclass(frozen=True, kw_only=True)
class OpenClip(ClipSettings):
    """A model of ``open_clip`` whose text tower is CLIP's.

    Args:
        model: File of weights, or a folder or hub id that holds it; not read with
            ``init: random``.
        architecture: ``open_clip``'s name of it; null reads ``open_clip_config.json`` beside the
            weights.
        file: The file in the folder; null looks for ``open_clip``'s usual names.
        fit: How others than squares become squares: ``crop``, ``squash`` or ``pad``; null is the
            model's own.
        init: ``pretrained`` reads weights; ``random`` makes them up, to measure or to try.
    """

    model: str = CLIP_H
    architecture: str | None = None
    file: str | None = None
    fit: ImageFit | None = None
    init: Literal["pretrained", "random"] = "pretrained"

    def load_scorer(self) -> Scorer:
        """See ``ClipSettings``."""
        if self.init == "random":
            scorer = random_open_clip_scorer(self.architecture or "ViT-H-14")
        else:
            scorer = load_open_clip_scorer(
                self.model, architecture=self.architecture, file=self.file
            )
        settings = scorer.image_settings
        return scorer._replace(image_settings=replace(settings, fit=self.fit or settings.fit))


@dataclass(frozen=True, kw_only=True)
class ClipH(HuggingFaceClip):
    """CLIP ViT-H/14 of LAION, which PickScore, HPSv2 and Denscore start from."""


@dataclass(frozen=True, kw_only=True)
class PickScore(HuggingFaceClip):
    """PickScore v1 (arXiv 2305.01569), read as its authors do: whole, without text cleaning."""

    model: str = "yuvalkirstain/PickScore_v1"


@dataclass(frozen=True, kw_only=True)
class Denscore(HuggingFaceClip):
    """Denscore (arXiv 2410.11817): the mean over segments."""

    model: str = "luping-liu/Denscore"
    text: TextPart = "segments"


@dataclass(frozen=True, kw_only=True)
class Hpsv2(OpenClip):
    """HPSv2 (arXiv 2306.09341); its own pipeline pads images that are no squares."""

    model: str = "xswu/HPSv2"
    architecture: str | None = "ViT-H-14"
    file: str | None = "HPS_v2_compressed.pt"
    fit: ImageFit | None = "pad"


@dataclass(frozen=True, kw_only=True)
class Hpsv21(Hpsv2):
    """HPSv2.1: HPSv2 trained on better data; its scores have another scale."""

    file: str | None = "HPS_v2.1_compressed.pt"


def check_global_batch(reward: Reward, num_captions: int) -> None:
    """Refuse a global batch of one caption where a reward estimates V from its batches.

    Calling such a reward refuses it too; this tells before weights are moved and images made.

    Args:
        reward: Any reward, also a mixture.
        num_captions: Captions of one call: a rank's batch times the ranks.

    Raises:
        ConfigError: If it does.
    """
    if isinstance(reward, nn.Module) and any(
        isinstance(part, BatchDirection) for part in reward.modules()
    ):
        check_batch_estimate(num_captions)


def _check_choice(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        names = ", ".join("null" if one is None else f"`{one}`" for one in known)
        raise ConfigError(f"expected `{name}` to be one of {names}; got `{value}`; choose one")
