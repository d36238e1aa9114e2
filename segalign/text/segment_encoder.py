"""Segment-level encoding of long captions with a CLIP text model.

Dims: B captions, N segments, L token budget, D text width, E width of pooled features.

Reference: arXiv 2410.11817, section 3 (segment-level encoding).
"""

from collections.abc import Sequence
from typing import get_args

from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.caption_plan import (
    CaptionPlan,
    LongSegments,
    fit_to_context,
    plan_caption,
    report_plans,
)
from segalign.text.clip_tower import ClipTower, TokenFeatures
from segalign.text.conditioning import TextConditioning
from segalign.text.merging import gather_tokens, mean_end_state
from segalign.text.segmenter import Segment, Segmenter, SentenceSegmenter
from segalign.text.special_tokens import SpecialTokenPolicy, padding_vector


class SegmentEncoder(nn.Module):
    """Encode each segment of a caption alone and concatenate the kept tokens.

    Equal segments of a batch are encoded once, segments of like length together. A caption's
    result does not depend on the batch. Features of a frozen model are cached. The module has
    gradients through the text model if that is trainable.

    Args:
        text_model: CLIP text model of any width.
        tokenizer: Its tokenizer.
        segmenter: Splitting strategy; None is :class:`SentenceSegmenter`.
        policy: Treatment of special tokens; None is the paper's.
        token_budget: L, the length of the result (official: 240).
        long_segments: What to do with a segment that does not fit the context: ``cut_further`` at
            the best boundary, or ``truncate`` as the official code does. Both are reported.
        text_projection: Maps pooled features from D to E; None leaves them as they are.
        cache_bytes: Bound on the memory of cached features; 0 caches nothing.

    Raises:
        ConfigError: If the token budget, or the context for the padding vector, is too small.
    """

    def __init__(
        self,
        text_model: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        segmenter: Segmenter | None = None,
        policy: SpecialTokenPolicy | None = None,
        token_budget: int = 240,
        long_segments: LongSegments = "cut_further",
        text_projection: nn.Module | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__()
        self.tower = ClipTower(text_model, tokenizer, cache_bytes=cache_bytes)
        self.segmenter: Segmenter = segmenter or SentenceSegmenter()
        self.policy = policy or SpecialTokenPolicy()
        self.token_budget = token_budget
        self.long_segments = long_segments
        self.text_projection = text_projection
        self.width = self.tower.width
        self._check_settings()

    def forward(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions.

        Args:
            captions: B captions; the empty one becomes a start token and padding.

        Returns:
            Conditioning of length L. ``pooled`` is the mean end-token state of the segments that
            have a token within the budget. dtype and device are the text model's.
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

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Encode the empty caption, the negative prompt of classifier-free guidance.

        Returns:
            Conditioning whose tensors are one row expanded to ``batch_size``: do not write to it.
        """
        empty: TextConditioning = self([""])
        return empty.expand(batch_size)

    def split(self, caption: str) -> list[Segment]:
        """Split a caption into the segments that are encoded, over-long ones cut."""
        segments = self.segmenter.split(caption)
        return fit_to_context(segments, self.tower, self.long_segments)[0]

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
        padded_empty = self.tower.wrap((), padded=True)
        features: TokenFeatures = self.tower(
            [padded_empty, *(s.input_ids for row in tokens for s in row)]
        )
        padding = padding_vector(features[padded_empty], self.policy)
        prompt_embeds, mask = gather_tokens(tokens, features, padding, self.token_budget)
        pooled = self._project(mean_end_state(tokens, features))
        return TextConditioning(prompt_embeds, mask, pooled, report_plans(plans))

    def _plan(self, segments: Sequence[Segment]) -> CaptionPlan:
        """Choose the tokens of one caption."""
        return plan_caption(
            segments,
            self.tower,
            policy=self.policy,
            token_budget=self.token_budget,
            long_segments=self.long_segments,
        )

    def _project(self, pooled: Tensor) -> Tensor:
        """Map pooled features to the joint space, if there is a projection."""
        return pooled if self.text_projection is None else self.text_projection(pooled)

    def _check_settings(self) -> None:
        """Refuse settings that cannot work."""
        if self.long_segments not in get_args(LongSegments):
            known = ", ".join(f"`{choice}`" for choice in get_args(LongSegments))
            raise ConfigError(f"`long_segments` must be one of {known}; got {self.long_segments!r}")
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
