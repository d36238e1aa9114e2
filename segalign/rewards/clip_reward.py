"""CLIP-type rewards: CLIP-H, PickScore, HPSv2, Denscore and any other CLIP, one class.

Dims: B batch, N segments in the batch, E joint-embedding width, M images of a call.

Reference: arXiv 2410.11817 (segment-level score, reweighting).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from segalign.errors import DataError
from segalign.formats.clip_scorer import ResizeFilter, Scorer, load_clip_scorer
from segalign.rewards.bound_reward import RewardTerms
from segalign.rewards.common_direction import CommonDirection, ask_direction, observe_direction
from segalign.rewards.decomposition import common_share, reweight, text_irrelevant
from segalign.rewards.protocol import FrozenReward, check_batch
from segalign.rewards.segment_scorer import SegmentFeatures, SegmentScorer
from segalign.text.segmenter import Segmenter
from segalign.text.tokenizer import TextCleaning


@dataclass(frozen=True, eq=False)
class ScoreParts:
    """A batch's scores and what they are made of; the sum of the first two is the plain score.

    Attributes:
        text_relevant: ``(B,)``.
        text_irrelevant: ``(B,)``.
        common_share: Projection of the text features on the common direction, ``(B,)``.
        segment_scores: Score of each segment alone, by caption.
    """

    text_relevant: Tensor
    text_irrelevant: Tensor
    common_share: Tensor
    segment_scores: list[Tensor]


class ClipReward(FrozenReward):
    """Score images against captions with a CLIP model, whole or segment by segment.

    The score is the inner product of the unit image features and the text features: those of the
    caption, cut at the context, or the mean of its segments' unit features. That mean is the mean
    of the segments' scores; it is shorter than 1 where segments differ.

    Args:
        scorer: Model, tokenizer and image settings; the model is frozen and shared, not copied.
        segmenter: Splits captions; None scores them whole.
        renormalize: Scale the mean of segments to length 1 again.
        common_direction: Estimate of V; None leaves scores as they are.
        omega: Factor of the text-irrelevant part, in [0, 1].
        cleaning: Repair of texts, see ``clean_text``; None is the model's own.
        resize: Filter; None is the model's own.
        crop: See ``ImagePreprocessing``.
        seed: Seed of the crop.
        cache_bytes: Bound on the memory of cached text features.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        segmenter: Segmenter | None = None,
        renormalize: bool = False,
        common_direction: CommonDirection | None = None,
        omega: float = 1.0,
        cleaning: TextCleaning | None = None,
        resize: ResizeFilter | None = None,
        crop: int | None = None,
        seed: int = 0,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        super().__init__()
        self.scorer = SegmentScorer(
            scorer,
            segmenter=segmenter,
            cleaning=cleaning,
            resize=resize,
            crop=crop,
            seed=seed,
            cache_bytes=cache_bytes,
        )
        self.freeze()
        self.renormalize = renormalize
        self.common_direction = common_direction
        self.omega = omega

    @override
    def set_step(self, step: int | None) -> None:
        """Tell the step of the crop: see ``FrozenReward``."""
        super().set_step(step)
        self.scorer.preprocessing.step = step

    @classmethod
    def from_pretrained(cls, source: str, **settings: object) -> "ClipReward":
        """Read the model from a folder or the hub; ``settings`` are those of the constructor."""
        return cls(load_clip_scorer(source), **settings)  # type: ignore[arg-type]

    @override
    def networks(self) -> Iterable[nn.Module]:
        """List the scorer alone: an estimate of V may learn in training mode."""
        return (self.scorer,)

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score each image against its own caption: see ``Reward``.

        Raises:
            DataError: If images and captions do not fit, or features are not finite.
            NonFiniteError: If an image is not finite.
        """
        check_batch(images, captions)
        texts = self._read(self.segment_features(captions))
        return (self.image_features(images) * texts.weighted).sum(dim=-1)

    def bind(self, captions: Sequence[str], counted: Tensor | None = None) -> "BoundClipReward":
        """Encode captions and ask for the common direction, once for all images: see `bind_reward`.

        An estimate that learns does so here, as in a call. With a common direction, the parts are
        ``text_relevant`` and ``text_irrelevant``, whose sum is the plain score, whatever omega is,
        and ``common_share``.

        Args:
            captions: ``B`` captions, all of which can be scored.
            counted: Which of them an estimate of the common direction sees, bool ``(B,)``; None is
                all.
        """
        # What is not finite is handed on: other ranks would wait for one that raises.
        return BoundClipReward(self, self._read(self._encode(captions), counted))

    def image_features(self, images: Tensor) -> Tensor:
        """Encode images in [0, 1] to unit vectors ``(B, E)``; differentiable in the images.

        Raises:
            DataError: If the model gives features that are not finite.
        """
        self.freeze()
        return check_features(self.scorer.image_features(images), "image")

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to ``(B, E)``: unit vectors, or means of segments' unit vectors."""
        return self._mean(self.segment_features(captions))

    def segment_features(self, captions: Sequence[str]) -> SegmentFeatures:
        """Encode the captions' segments, without gradient: see ``SegmentScorer``.

        Raises:
            DataError: If the model gives features that are not finite.
        """
        segments = self._encode(captions)
        check_features(segments.features, "text")
        return segments

    def split(self, caption: str) -> list[str]:
        """Split a caption into the texts that are scored."""
        return self.scorer.split(caption)

    def segment_scores(self, images: Tensor, captions: Sequence[str]) -> list[Tensor]:
        """Score each image against each segment of its caption, for reports; no gradient.

        Returns:
            Scores ``(n,)`` for each caption, plain: no common direction, whatever the reward has.
            The segments are those of `split`.
        """
        check_batch(images, captions)
        with torch.no_grad():
            return _scores_of(self.segment_features(captions), self.image_features(images))

    def score_parts(self, images: Tensor, captions: Sequence[str]) -> ScoreParts:
        """Score images and take the scores apart, for logs and reports; no gradient.

        The common direction learns nothing from it. One that follows the batches is asked on all
        ranks, so that all of them must call this.

        Raises:
            ValueError: If there is no common direction.
        """
        if self.common_direction is None:
            raise ValueError("expected a common direction; the reward has none; give it one")
        check_batch(images, captions)
        with torch.no_grad():
            image_features = self.image_features(images)
            segments = self.segment_features(captions)
            text = self._mean(segments)
            direction = observe_direction(self.common_direction, text)
            plain = (image_features * text).sum(dim=-1)
            along = (image_features * text_irrelevant(text, direction)).sum(dim=-1)
            scores = _scores_of(segments, image_features)
        return ScoreParts(plain - along, along, common_share(text, direction), scores)

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> SegmentFeatures:
        self.freeze()
        return self.scorer.segment_features(captions)

    def _read(self, segments: SegmentFeatures, counted: Tensor | None = None) -> "_Texts":
        """Make of captions' segments what the images are scored against."""
        text = self._mean(segments)
        if self.common_direction is None:
            return _Texts(text)
        direction = ask_direction(self.common_direction, text, counted)
        # Autocast would round the shares, and leave some of V in the text-relevant part.
        with torch.autocast(text.device.type, enabled=False):
            along = text_irrelevant(text, direction)
            return _Texts(
                reweight(text, direction, self.omega),
                {"text_relevant": text - along, "text_irrelevant": along},
                {"common_share": common_share(text, direction)},
            )

    def _mean(self, segments: SegmentFeatures) -> Tensor:
        """Average each caption's segments, ``(B, E)``."""
        means = segments.mean()
        return F.normalize(means, dim=-1) if self.renormalize else means


@dataclass(frozen=True, eq=False)
class _Texts:
    """Text features of a batch, without gradient.

    Attributes:
        weighted: Those that images are scored against, ``(B, E)``.
        parts: What they are made of, ``(B, E)``.
        values: What is known of each caption without an image, ``(B,)``.
    """

    weighted: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BoundClipReward:
    """A reward that knows its captions."""

    reward: ClipReward
    texts: _Texts

    def __call__(self, images: Tensor, rows: Tensor) -> RewardTerms:
        """See ``BoundReward``."""
        self.reward.freeze()
        # Not `image_features`: its check waits for the device.
        return self.score_features(self.reward.scorer.image_features(images), rows)

    def score_features(self, image_features: Tensor, rows: Tensor) -> RewardTerms:
        """Score images by their unit features ``(M, E)``, which others may need too."""
        rewards = (image_features * self.texts.weighted[rows]).sum(dim=-1)
        seen = image_features.detach()
        parts = {name: (seen * part[rows]).sum(dim=-1) for name, part in self.texts.parts.items()}
        return RewardTerms(rewards, parts | {n: v[rows] for n, v in self.texts.values.items()})


def check_features(features: Tensor, of: str) -> Tensor:
    """Return features ``(N, E)`` of an image or text tower, if they are finite.

    Raises:
        DataError: If they are not.
    """
    if not torch.isfinite(features).all():
        raise DataError(
            f"expected finite {of} features of the scorer; got NaN; check its weights and dtype"
        )
    return features


def _scores_of(segments: SegmentFeatures, image_features: Tensor) -> list[Tensor]:
    pairs = zip(segments.split(), image_features, strict=True)
    return [part @ image.to(part) for part, image in pairs]
