"""Estimate a scorer's common direction from any number of captions, in bounded memory.

The captions are read twice, for the direction and for the shares along it. Memory holds one batch,
and 8 bytes for each caption.

Dims: B batch, E joint-embedding width.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from segalign.data.caption_stream import CaptionStream
from segalign.data.faults import SampleFault
from segalign.data.progress import show_progress
from segalign.errors import DataError
from segalign.rewards.common_direction import (
    MIN_CORPUS,
    CorpusDirection,
    CorpusMean,
    Provenance,
    ShareStatistics,
    share_statistics,
)
from segalign.rewards.direction_checks import describe_text, text_digest
from segalign.rewards.segment_scorer import SegmentScorer

_MAX_BATCH_CHARS = 2**17


class CaptionFeatures:
    """Text features of the captions of shards, as rewards compute them.

    Args:
        captions: The captions.
        scorer: Embeds them, whole or in segments.
        batch_size: Captions embedded at a time; fewer where they are long.
        limit: Read only the first so many samples.

    Attributes:
        captions_digest: Digest of the usable captions of the last reading, in order.
        set_aside: Number of samples without a usable caption in it, by reason.
    """

    def __init__(
        self,
        captions: CaptionStream,
        scorer: SegmentScorer,
        *,
        batch_size: int = 64,
        limit: int | None = None,
    ) -> None:
        self.captions = captions
        self.scorer = scorer
        self.batch_size = batch_size
        self.num_samples = len(captions) if limit is None else min(limit, len(captions))
        self.captions_digest = ""
        self.set_aside: Counter[str] = Counter()

    def read(self, title: str) -> Iterator[Tensor]:
        """Yield features of all captions from the first on, float64 ``(B, E)`` on the CPU.

        Args:
            title: What the progress on stderr is called.

        Raises:
            DataError: If features are not finite.
        """
        digest = hashlib.blake2b(digest_size=16)
        self.set_aside = Counter()
        with show_progress(title, self.num_samples) as advance:
            for first, batch in self._batches():
                usable = {}
                for sample_id, caption in enumerate(batch, first):
                    if isinstance(caption, SampleFault):
                        self.set_aside[caption.reason] += 1
                        continue
                    usable[sample_id] = caption
                    raw = caption.encode()
                    digest.update(len(raw).to_bytes(8, "little") + raw)
                if usable:
                    yield self._embed(usable)
                advance(len(batch))
        self.captions_digest = digest.hexdigest()

    def _batches(self) -> Iterator[tuple[int, list[str | SampleFault]]]:
        """Group captions, few of them where they are long; with each group's first sample id."""
        first, num_chars = 0, 0
        batch: list[str | SampleFault] = []
        for caption in islice(self.captions.read(), self.num_samples):
            batch.append(caption)
            num_chars += len(caption) if isinstance(caption, str) else 0
            if len(batch) == self.batch_size or num_chars >= _MAX_BATCH_CHARS:
                yield first, batch
                first, num_chars, batch = first + len(batch), 0, []
        if batch:
            yield first, batch

    @torch.no_grad()
    def _embed(self, captions: dict[int, str]) -> Tensor:
        """Embed captions by sample id, ``(B, E)``."""
        features = self.scorer.segment_features(list(captions.values())).mean().double().cpu()
        broken = (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise DataError(
                "expected finite text features of the scorer; got NaN for sample "
                f"{list(captions)[broken[0]]} of `{self.captions.folder}`; look for NaN in the "
                "model's weights"
            )
        return features


@dataclass(frozen=True, eq=False, kw_only=True)
class EstimatedDirection:
    """A common direction, and how strong it is.

    Attributes:
        direction: V, float64 ``(E,)``.
        provenance: Where it comes from.
        mean_norm: Length of the mean of all features, in [0, 1].
        shares: Statistics of the common shares of all captions.
        set_aside: Number of samples without a usable caption, by reason.
    """

    direction: Tensor
    provenance: Provenance
    mean_norm: float
    shares: ShareStatistics
    set_aside: dict[str, int]

    def for_use(self) -> CorpusDirection:
        """Return what rewards take and files hold."""
        return CorpusDirection(self.direction, self.provenance)


def estimate_direction(features: CaptionFeatures, model_name: str) -> EstimatedDirection:
    """Estimate the common direction of captions.

    Args:
        features: Their features.
        model_name: The scorer's name, for people.

    Raises:
        DataError: If there are too few captions, or their features are not finite or cancel out.
    """
    mean = CorpusMean()
    for batch in features.read("estimating"):
        mean.update(batch)
    check_corpus(features.captions.folder, features.num_samples, features.set_aside)
    direction = mean.direction()
    provenance = Provenance(
        model=model_name,
        model_digest=text_digest(features.scorer),
        text=describe_text(features.scorer.segmenter),
        captions_digest=features.captions_digest,
        num_captions=mean.count,
    )
    shares, _ = share_statistics(features.read("projecting"), direction)
    return EstimatedDirection(
        direction=direction,
        provenance=provenance,
        mean_norm=mean.norm,
        shares=shares,
        set_aside=dict(sorted(features.set_aside.items())),
    )


def check_corpus(
    folder: Path, num_samples: int, set_aside: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Refuse a corpus that is too small.

    Args:
        folder: Its shards.
        num_samples: Samples of them that are read.
        set_aside: Number of those without a usable caption, by reason, as far as it is known.

    Raises:
        DataError: If it is.
    """
    num_bad = sum(set_aside.values())
    if num_samples - num_bad >= MIN_CORPUS:
        return
    reasons = ", ".join(f"{name}: {count}" for name, count in sorted(set_aside.items()))
    without = f", {num_bad} of them without a usable caption ({reasons})" if num_bad else ""
    raise DataError(
        f"expected at least {MIN_CORPUS} captions for a common direction; got {num_samples} "
        f"samples of `{folder}`{without}; give more captions, or raise the limit"
    )
