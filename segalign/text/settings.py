"""How a config describes the text encoding of a generator."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import CLIPTextModel, CLIPTokenizer

from segalign.text.caption_plan import LongSegments
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.segmenter import Segmenter
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.truncated_encoder import TruncatedEncoder


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """Settings of the text encoding.

    Args:
        kind: ``segments`` encodes each segment alone and merges them; ``truncated`` encodes the
            caption whole and loses what does not fit the encoder's context.
        segmenter: Splitting strategy; null splits into sentences.
        policy: Treatment of special tokens.
        token_budget: Length of the merged sequence (official: 240).
        long_segments: What becomes of a segment that does not fit the context.
        mask_padding: Hide padding from the generator. The official model sees it.
        cache_megabytes: Bound on the memory of cached features of a frozen encoder.
    """

    kind: Literal["segments", "truncated"] = "segments"
    segmenter: Segmenter | None = None
    policy: SpecialTokenPolicy = field(default_factory=SpecialTokenPolicy)
    token_budget: int = 240
    long_segments: LongSegments = "cut_further"
    mask_padding: bool = False
    cache_megabytes: int = 256

    def build(
        self, text_model: CLIPTextModel, tokenizer: CLIPTokenizer
    ) -> SegmentEncoder | TruncatedEncoder:
        """Make the encoder around a text model."""
        if self.kind == "truncated":
            return TruncatedEncoder(text_model, tokenizer, cache_bytes=self.cache_megabytes * 2**20)
        return SegmentEncoder(
            text_model,
            tokenizer,
            segmenter=self.segmenter,
            policy=self.policy,
            token_budget=self.token_budget,
            long_segments=self.long_segments,
            cache_bytes=self.cache_megabytes * 2**20,
        )
