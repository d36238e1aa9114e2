"""Segment-level encoding of long captions with a CLIP text model.

Dims: B captions, N segments, L token budget, D text width, E width of pooled features.

Reference: arXiv 2410.11817, section 3 (segment-level encoding).
"""

import logging
from collections.abc import Sequence
from typing import get_args

from torch import Tensor, nn
from transformers import CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.caption_plan import (
    CaptionPlan,
    LongSegments,
    OverBudget,
    SegmentTokens,
    fit_to_context,
    plan_caption,
    report_plans,
)
from segalign.text.clip_tower import ClipTower, TokenFeatures
from segalign.text.conditioning import CaptionEncoder, TextConditioning
from segalign.text.feature_store import FeatureStore
from segalign.text.merging import Pooling, check_pooling, gather_tokens, pool_segments
from segalign.text.segmenter import Segment, Segmenter, SentenceSegmenter
from segalign.text.segmenters import describe_segmenter
from segalign.text.special_tokens import SpecialTokenPolicy, padding_vector
from segalign.text.text_states import TextModel, check_projection

_logger = logging.getLogger(__name__)


class SegmentEncoder(CaptionEncoder):
    """Encode each segment of a caption alone and concatenate the kept tokens.

    Equal segments of a batch are encoded once, segments of like length together. A caption's
    result does not depend on the batch. Features of a frozen model are cached. The module has
    gradients through the text model if that is trainable.

    Args:
        text_model: CLIP text model of any width; its own projection, if it has one, is applied.
        tokenizer: Its tokenizer.
        segmenter: Splitting strategy; None is :class:`SentenceSegmenter`.
        policy: Treatment of special tokens; None is the paper's.
        token_budget: L, the length of the result (official: 240).
        long_segments: What to do with a segment that does not fit the context: ``cut_further`` at
            the best boundary, or ``truncate`` as the official code does. Both are reported.
        over_budget: What to do with a caption of more than L tokens: ``cut`` keeps the first L, as
            the official code does; ``proportional`` keeps of each segment its share. Reported.
        layer: See :class:`~segalign.text.clip_tower.ClipTower`.
        pooled: What becomes of the segments' end-token states: their ``mean``, or the ``first``.
        text_projection: Maps pooled features from D to E; None leaves them as they are.
        cache_bytes: Bound on the memory of cached features; 0 caches nothing.
        store: Features on disk, made with this text model; what it lacks is encoded.

    Raises:
        ConfigError: If the token budget, or the context for the padding vector, is too small, or
            the store is of another text model.
    """

    def __init__(
        self,
        text_model: TextModel,
        tokenizer: CLIPTokenizer,
        *,
        segmenter: Segmenter | None = None,
        policy: SpecialTokenPolicy | None = None,
        token_budget: int = 240,
        long_segments: LongSegments = "cut_further",
        over_budget: OverBudget = "cut",
        layer: int = -1,
        pooled: Pooling = "mean",
        text_projection: nn.Module | None = None,
        cache_bytes: int = 256 * 2**20,
        store: FeatureStore | None = None,
    ) -> None:
        super().__init__()
        self.tower = ClipTower(
            text_model, tokenizer, layer=layer, cache_bytes=cache_bytes, store=store
        )
        self.segmenter: Segmenter = segmenter or SentenceSegmenter()
        self.policy = policy or SpecialTokenPolicy()
        self.token_budget = token_budget
        self.long_segments = long_segments
        self.over_budget = over_budget
        self.pooling = check_pooling(pooled)
        self.text_projection = check_projection(text_model, text_projection)
        self.width = self.tower.width
        self._check_settings()
        if store is not None:
            _warn_of_other_segments(store, self.segmenter, long_segments)

    def forward(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions.

        Args:
            captions: B captions; the empty one becomes a start token and padding.

        Returns:
            Conditioning of length L. ``pooled`` is made of the end-token states of the segments
            that have a token within the budget. dtype and device are the text model's.
        """
        return self._encode([self.segmenter.split(caption) for caption in captions])

    def encode_segments(self, segments: Sequence[Sequence[str]]) -> TextConditioning:
        """Encode captions that are split already.

        Args:
            segments: The segments of B captions; one that does not fit the context is treated as
                ``long_segments`` says.

        Returns:
            As :meth:`forward`.
        """
        return self._encode([[Segment(t, 0, len(t)) for t in texts] for texts in segments])

    def split(self, caption: str) -> list[Segment]:
        """Split a caption into the segments that are encoded, over-long ones cut."""
        segments = self.segmenter.split(caption)
        return fit_to_context(segments, self.tower, self.long_segments)

    def segment_features(self, segments: Sequence[str]) -> Tensor:
        """Encode texts to one pooled vector each, equal texts once.

        Args:
            segments: N texts. What exceeds the context is cut off: pass the pieces of
                :meth:`split` to lose nothing.

        Returns:
            End-token states, ``(N, D)``, or ``(N, E)`` with a projection; not normalised.
        """
        return self._project(self.tower.end_states(segments))

    def clear_cache(self) -> None:
        """Forget cached features; needed after writing to ``.data`` of a weight."""
        self.tower.clear_cache()

    def _encode(self, captions: Sequence[Sequence[Segment]]) -> TextConditioning:
        """Plan, encode every distinct sequence once, merge."""
        if not captions:
            raise ValueError("expected at least one caption; got none")
        plans = [self._plan(segments) for segments in captions]
        tokens = [plan.tokens for plan in plans]
        prompt_embeds, mask, pooled = self._merge(tokens)
        report = report_plans(plans)
        num_leading = max(report.kept_tokens)
        return TextConditioning(prompt_embeds, mask, pooled, report, num_leading)

    def _merge(self, tokens: Sequence[Sequence[SegmentTokens]]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode planned captions to ``prompt_embeds``, ``attention_mask`` and ``pooled``."""
        prompt_embeds, mask, features = self._read(self.tower, tokens)
        pooled = self._project(pool_segments(tokens, features, self.pooling))
        return prompt_embeds, mask, pooled

    def _read(
        self, tower: ClipTower, tokens: Sequence[Sequence[SegmentTokens]]
    ) -> tuple[Tensor, Tensor, TokenFeatures]:
        """Encode every distinct sequence once with a tower, and merge the kept tokens."""
        padded_empty = tower.wrap((), padded=True)
        features: TokenFeatures = tower(
            [padded_empty, *(s.input_ids for row in tokens for s in row)]
        )
        padding = padding_vector(features[padded_empty], self.policy)
        return *gather_tokens(tokens, features, padding, self.token_budget), features

    def _plan(self, segments: Sequence[Segment]) -> CaptionPlan:
        """Choose the tokens of one caption."""
        return plan_caption(
            segments,
            self.tower,
            policy=self.policy,
            token_budget=self.token_budget,
            long_segments=self.long_segments,
            over_budget=self.over_budget,
        )

    def _project(self, pooled: Tensor) -> Tensor:
        """Map pooled features to the joint space, if there is a projection."""
        return pooled if self.text_projection is None else self.text_projection(pooled)

    def _check_settings(self) -> None:
        """Refuse settings that cannot work."""
        if self.long_segments not in get_args(LongSegments):
            known = ", ".join(f"`{choice}`" for choice in get_args(LongSegments))
            raise ConfigError(f"`long_segments` must be one of {known}; got {self.long_segments!r}")
        if self.over_budget not in get_args(OverBudget):
            known = ", ".join(f"`{choice}`" for choice in get_args(OverBudget))
            raise ConfigError(f"`over_budget` must be one of {known}; got {self.over_budget!r}")
        if self.token_budget < 1:
            raise ConfigError(
                f"`token_budget` must be at least 1; got {self.token_budget}; "
                "the official value is 240"
            )
        if self.policy.num_pad_positions > self.tower.context_length:
            raise ConfigError(
                f"`policy.num_pad_positions` must be at most the context of the text model "
                f"({self.tower.context_length}); got {self.policy.num_pad_positions}; lower it"
            )


def _warn_of_other_segments(
    store: FeatureStore, segmenter: Segmenter, long_segments: LongSegments
) -> None:
    """Say that a store will seldom help, because its captions were split in another way."""
    try:
        own: object = describe_segmenter(segmenter), long_segments
    except ConfigError:
        own = type(segmenter).__name__, long_segments
    stored = store.description["segmenter"], store.description["long_segments"]
    if own != stored:
        _logger.warning(
            "the feature store `%s` holds segments of %s; captions are split by %s here, and what "
            "differs is encoded again; see `shards encode --segmenter`",
            store.folder,
            stored,
            own,
        )
