"""What a metric of generated images is, and what it is given.

Dims: B images of a micro-batch, N images of the plan, H/W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from segalign.diffusion.generator import Weights
from segalign.evaluation.captions import CaptionRow
from segalign.evaluation.plan import EvaluationPlan


class Source(Protocol):
    """Settings of something heavy, such as a feature extractor; making them reads nothing."""

    def load(self) -> Any:
        """Read the weights."""
        ...


class SourcePool:
    """Loads what several metrics share once: sources of one class with equal settings."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[type, str], Any] = {}

    def load(self, source: Source) -> Any:
        """Return what ``source.load()`` returns, or has returned for one like it."""
        key = (type(source), repr(sorted(vars(source).items())))
        if key not in self._loaded:
            self._loaded[key] = source.load()
        return self._loaded[key]


@dataclass(frozen=True)
class EvaluationSetting:
    """What is the same for all images of an evaluation.

    Attributes:
        plan: The images.
        rows: Their captions, ``plan.num_captions`` of them.
        eval_seed: Seed of their noise.
        weights: The weights that make them.
        device: Where images are, and where networks of metrics go.
        pool: Loads networks.
        is_final: False while training, where a metric that is dear may leave out what is only
            for reports.
    """

    plan: EvaluationPlan
    rows: Sequence[CaptionRow]
    eval_seed: int
    weights: Weights
    device: torch.device
    pool: SourcePool
    is_final: bool = True


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Images of a micro-batch, those of a caption beside each other; no gradient.

    Attributes:
        places: Place of each image in the plan, int64 ``(B,)``, on the CPU.
        counted: Which of them count, bool ``(B,)``, on the device: no padding, made, and finite.
        rows: Their captions, ``B``.
        pixels: uint8 ``(B, 3, H, W)``, clamped and rounded as files are; 0 where not made.
        start_pixels: Images of the same captions and noise by the model as it was before training,
            uint8 ``(B, 3, H, W)``, or None if there are none.
        start_finite: Which of those were finite, bool ``(B,)``; None without them.
    """

    places: Tensor
    counted: Tensor
    rows: Sequence[CaptionRow]
    pixels: Tensor
    start_pixels: Tensor | None = None
    start_finite: Tensor | None = None
    # Functions are kept beside what they gave, so that no other can take their number.
    _memo: dict[int, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    @property
    def captions(self) -> list[str]:
        """The captions, ``B``."""
        return [row["caption"] for row in self.rows]

    @property
    def images(self) -> Tensor:
        """The images as float32 in [0, 1], ``(B, 3, H, W)``."""
        return self.pixels.float() / 255

    def once(self, function: Callable[[Tensor], Any]) -> Any:
        """Return ``function(pixels)``, computed once a batch for all metrics that share it."""
        if id(function) not in self._memo:
            self._memo[id(function)] = (function, function(self.pixels))
        return self._memo[id(function)][1]


@dataclass(frozen=True)
class Findings:
    """What a metric has found, the same on every rank.

    Attributes:
        values: Numbers by the name they are logged under, such as ``fid``.
        protocol: All that a number depends on besides images and captions, plain data: two numbers
            of different protocols must never be compared.
        per_image: By name, a value for each place of the plan, plain data; None where the image
            does not count.
        notes: What a reader must know, a line each.
    """

    values: Mapping[str, float]
    protocol: Mapping[str, Any]
    per_image: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


class ImageMetric(ABC):
    """A metric of generated images.

    An evaluation calls ``start`` at least once, ``update`` for every micro-batch, equally often on
    every rank but for those of which no image could be made, and ``finish`` once. Results must not
    depend on how micro-batches are dealt out to ranks. Metrics must draw no random numbers, and may
    use collectives in ``start`` and ``finish`` alone.

    Attributes:
        name: Names the metric in result files; unique in an evaluation.
    """

    name: str

    @abstractmethod
    def start(self, setting: EvaluationSetting) -> None:
        """Forget earlier images, and check that the evaluation can be measured.

        Raises:
            ConfigError: If it cannot, on every rank alike; nothing has been generated yet.
            DataError: If a file that is needed is missing or foreign.
        """

    @abstractmethod
    def update(self, batch: ImageBatch) -> None:
        """Take in a micro-batch; rows that are not counted change nothing."""

    @abstractmethod
    def finish(self) -> Findings:
        """Join the ranks, every one of which must call this."""
