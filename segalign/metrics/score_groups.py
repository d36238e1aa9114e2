"""Scores of images sorted by the length of the caption and by the place of the segment.

Dims: N images, n segments of a caption.
"""

import math
from collections.abc import Iterable, Sequence

from segalign.metrics.pair_buckets import (
    LENGTHS,
    SEGMENT_KEYS,
    bucket_of_length,
    segment_group,
)

Score = float | None


def finite(scores: Iterable[Score]) -> list[float]:
    """Leave out what is missing or not finite."""
    return [score for score in scores if score is not None and math.isfinite(score)]


def mean(scores: Sequence[float]) -> float:
    """Average scores, at least one; the sum is rounded once, so that their order is nothing."""
    return math.fsum(scores) / len(scores)


def by_length(num_tokens: Sequence[int | None], scores: Sequence[Score]) -> dict[str, list[float]]:
    """Sort scores by the length of the caption.

    Args:
        num_tokens: Tokens of each image's caption, start and end included, ``N``; None with a
            score that is missing.
        scores: ``N``.

    Returns:
        Those that are finite, by ``LENGTHS``; groups without any are left out.
    """
    groups: dict[str, list[float]] = {name: [] for name in LENGTHS}
    for count, score in zip(num_tokens, scores, strict=True):
        if count is not None:
            groups[bucket_of_length(count)] += finite([score])
    return {name: found for name, found in groups.items() if found}


def by_position(scores: Iterable[Sequence[float] | None]) -> dict[str, list[float]]:
    """Sort scores of segments by their number in the caption.

    Args:
        scores: Of each image, those of its ``n`` segments in their order; None where missing.

    Returns:
        Those that are finite, by ``SEGMENT_KEYS``; groups without any are left out.
    """
    groups: dict[str, list[float]] = {name: [] for name in SEGMENT_KEYS}
    for segments in scores:
        for position, score in enumerate(segments or ()):
            groups[SEGMENT_KEYS[segment_group(position)]] += finite([score])
    return {name: found for name, found in groups.items() if found}


def offsets(scores: Iterable[Sequence[float] | None]) -> list[list[float]]:
    """Take from each segment's score the mean of its caption's, for captions of two or more.

    Captions with many segments are other captions than those with few, so that plain scores of
    late segments are not comparable with those of early ones; their offsets are.
    """
    return [
        [score - mean(segments) for score in segments]
        for segments in scores
        if segments is not None and len(segments) > 1 and all(map(math.isfinite, segments))
    ]
