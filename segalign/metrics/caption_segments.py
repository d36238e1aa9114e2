"""Split captions as scorers do, with any segmenter, so that all scorers can be read in segments.

Dims: B batch, N segments in the batch, E joint-embedding width.
"""

from collections.abc import Sequence

import torch

from segalign.rewards.segment_scorer import SegmentFeatures, SegmentScorer
from segalign.text.long_segments import cut_segment
from segalign.text.segmenter import Segment, Segmenter


def caption_segments(scorer: SegmentScorer, segmenter: Segmenter, caption: str) -> list[Segment]:
    """Split a caption into pieces that fit the scorer's context, at least one."""
    tower = scorer.tower
    return [
        piece
        for segment in segmenter.split(caption)
        for piece in cut_segment(segment, tower.max_word_tokens, tower.count_word_tokens)
    ]


def segment_features(
    scorer: SegmentScorer, segmenter: Segmenter, captions: Sequence[str]
) -> SegmentFeatures:
    """Embed the segments of captions: see ``SegmentScorer.segment_features``."""
    split = [caption_segments(scorer, segmenter, caption) for caption in captions]
    texts = [segment.text for one in split for segment in one]
    features = scorer.text_features(texts)
    counts = torch.tensor([len(one) for one in split], device=features.device)
    rows = torch.arange(len(split), device=features.device)
    return SegmentFeatures(features, rows.repeat_interleave(counts), texts)
