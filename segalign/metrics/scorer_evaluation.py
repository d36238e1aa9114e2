"""Evaluate a scorer on batches: retrieval on images, accuracy on preference pairs.

Dims: B batch, N segments in the batch, T readings of a caption, E joint-embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.errors import DataError
from segalign.metrics.pair_accuracy import PairAccuracy
from segalign.metrics.pair_buckets import pair_buckets
from segalign.metrics.ranking import to_fixed_point
from segalign.metrics.retrieval import Retrieval
from segalign.metrics.text_readings import AVERAGE, SINGLE, TextReadings
from segalign.modes import evaluation_mode
from segalign.rewards.common_direction import CorpusDirection
from segalign.rewards.decomposition import text_relevant
from segalign.rewards.direction_checks import check_direction, describe_text, text_digest
from segalign.rewards.segment_scorer import SegmentFeatures, SegmentScorer
from segalign.text.segmenter import Segmenter, SentenceSegmenter
from segalign.types import CaptionBatch, PreferenceBatch


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is evaluated.

    Attributes:
        max_segments: See ``TextReadings``.
        gallery_size: See ``Retrieval``.
        segmenter: Splits captions; None is the scorer's, or sentences if it has none.
        common_direction: V of C_perp, for all readings. Without it, retrieval estimates V from
            the captions that it ranks, and pair accuracy has no C_perp.
        retrieval_on_preferred: Rank the preferred images of preference pairs too.
    """

    max_segments: tuple[int, ...] = ()
    gallery_size: int | None = None
    segmenter: Segmenter | None = None
    common_direction: CorpusDirection | None = None
    retrieval_on_preferred: bool = False


class ScorerEvaluation:
    """Gather what a scorer makes of batches.

    Every batch costs one pass of its images, padded rows included, and one of its texts. The
    scorer is left as it was.

    Args:
        scorer: The scorer.
        settings: See ``EvaluationSettings``.

    Attributes:
        readings: The readings of captions that are ranked.
        pair_readings: Those that score pairs.
        own_reading: The one that the scorer's own scores use.
        retrieval: The metric; None until there were images.
        pairs: The metric; None until there were preference pairs.

    Raises:
        DataError: If the common direction is not this scorer's.
    """

    def __init__(self, scorer: SegmentScorer, settings: EvaluationSettings) -> None:
        self.scorer = scorer
        self.settings = settings
        self.segmenter = settings.segmenter or scorer.segmenter or SentenceSegmenter()
        self.readings = TextReadings(settings.max_segments)
        self.pair_readings = TextReadings()
        self.own_reading = SINGLE if scorer.segmenter is None else AVERAGE
        self.retrieval: Retrieval | None = None
        self.pairs: PairAccuracy | None = None
        self._direction = _check_direction(settings.common_direction, scorer)

    @property
    def ways(self) -> list[tuple[str, str]]:
        """Name the ways in which pairs are scored: part of the text, reading."""
        parts = ("C",) if self._direction is None else ("C", "C_perp")
        return [(part, reading) for part in parts for reading in self.pair_readings.names]

    @torch.no_grad()
    def update(self, batch: CaptionBatch | PreferenceBatch) -> None:
        """Add a batch of images or of preference pairs.

        Raises:
            DataError: If it holds no images, or the scorer's features are not finite.
        """
        with evaluation_mode(self.scorer):
            if "image_pairs" in batch:
                self._add_pairs(batch)  # type: ignore[arg-type]
            elif "images" in batch:
                images = self.scorer.image_features(batch["images"].float())
                self._add_images(batch, images, batch["valid"], *self._texts(batch["captions"]))
            else:
                raise DataError(
                    "expected images with captions, or preference pairs, to evaluate a scorer; "
                    "got captions alone; set `data.content` to `image` or `preference`"
                )

    def _texts(self, captions: list[str]) -> tuple[Tensor, SegmentFeatures]:
        """Encode captions whole and in segments."""
        segments = self.scorer.segment_features(captions, segmenter=self.segmenter)
        return self.scorer.text_features(captions), segments

    def _add_images(
        self,
        batch: CaptionBatch | PreferenceBatch,
        image_features: Tensor,
        valid: Tensor,
        whole: Tensor,
        segments: SegmentFeatures,
    ) -> None:
        if self.retrieval is None:
            self.retrieval = Retrieval(
                len(self.readings.names),
                gallery_size=self.settings.gallery_size,
                common_direction=self._direction,
            )
        texts = self.readings.features(whole, segments)
        self.retrieval.update(batch["sample_ids"], batch["captions"], image_features, texts, valid)

    def _add_pairs(self, batch: PreferenceBatch) -> None:
        if self.pairs is None:
            self.pairs = PairAccuracy(len(self.ways)).to(batch["image_pairs"].device)
        pairs, probs = batch["image_pairs"].float(), batch["preference_probs"]
        flat = self.scorer.image_features(pairs.flatten(0, 1))
        images = flat.view(len(pairs), 2, -1)
        whole, segments = self._texts(batch["captions"])
        points = to_fixed_point(images.cpu())
        buckets = [
            pair_buckets(self.scorer, self.segmenter, caption, metadata) if is_valid else ()
            for caption, metadata, is_valid in zip(
                batch["captions"], batch["metadata"], batch["valid"].tolist(), strict=True
            )
        ]
        self.pairs.update(
            points @ self._pair_texts(whole, segments).mT,
            probs,
            batch["valid"],
            buckets,
            [
                to_fixed_point(part.cpu()) @ pair.T
                for part, pair in zip(segments.split(), points, strict=True)
            ],
        )
        if self.settings.retrieval_on_preferred:
            preferred = probs.argmax(dim=1)
            rows = torch.arange(len(preferred), device=preferred.device)
            is_ranked = batch["valid"] & (probs[:, 0] != probs[:, 1])
            self._add_images(batch, images[rows, preferred], is_ranked, whole, segments)

    def _pair_texts(self, whole: Tensor, segments: SegmentFeatures) -> Tensor:
        """Return the features of a caption in each way, in fixed point, ``(B, R, E)``."""
        plain = self.pair_readings.features(whole, segments).double()
        if self._direction is None:
            return to_fixed_point(plain)
        relevant = text_relevant(plain.flatten(0, 1), self._direction)
        return to_fixed_point(torch.cat([plain, relevant.view_as(plain)], dim=1))


def _check_direction(direction: CorpusDirection | None, scorer: SegmentScorer) -> Tensor | None:
    """Return V, ``(E,)``, if there is one.

    Raises:
        DataError: If it is that of another scorer.
    """
    if direction is None:
        return None
    common: Tensor = direction.cpu()(torch.zeros(1, scorer.width))
    check_direction(direction, text_digest(scorer), describe_text(scorer.segmenter))
    return common
