"""Decide which tokens of a caption's segments are encoded and kept.

Dims: L token budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from segalign.text.clip_tower import ClipTower
from segalign.text.conditioning import TextReport
from segalign.text.long_segments import cut_segment
from segalign.text.segmenter import Segment
from segalign.text.special_tokens import SpecialTokenPolicy, kept_positions
from segalign.text.tokenizer import TokenIds

LongSegments = Literal["cut_further", "truncate"]


@dataclass(frozen=True, eq=False)
class SegmentTokens:
    """The tokens of one segment that the merged sequence of its caption holds.

    Attributes:
        input_ids: What the encoder reads: start, words, end.
        positions: Kept positions into ``input_ids``, int64.
    """

    input_ids: TokenIds
    positions: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CaptionPlan:
    """What of a caption is encoded and kept.

    Attributes:
        tokens: The segments of which at least one token is kept.
        num_segments: Segments after cutting.
        num_cut: Segments that did not fit the context.
        num_dropped: Tokens that the policy would keep but that did not fit.
    """

    tokens: list[SegmentTokens]
    num_segments: int
    num_cut: int
    num_dropped: int


def plan_caption(
    segments: Sequence[Segment],
    tower: ClipTower,
    *,
    policy: SpecialTokenPolicy,
    token_budget: int,
    long_segments: LongSegments,
) -> CaptionPlan:
    """Tokenize the segments of a caption and choose the tokens to keep.

    Args:
        segments: The segments. Those without a single word are left out, unless all are.
        tower: The encoder that will read them.
        policy: Treatment of special tokens.
        token_budget: L.
        long_segments: Treatment of segments that do not fit the context.
    """
    pieces, num_cut = fit_to_context(segments, tower, long_segments)
    words = [ids for piece in pieces if (ids := tower.word_ids(piece.text))] or [()]
    num_lost = sum(max(len(ids) - tower.max_word_tokens, 0) for ids in words)
    sequences = [tower.wrap(ids[: tower.max_word_tokens]) for ids in words]
    tokens, num_dropped = fit_to_budget(sequences, policy, tower.pad_token_id, token_budget)
    return CaptionPlan(tokens, len(sequences), num_cut, num_dropped + num_lost)


def fit_to_context(
    segments: Sequence[Segment], tower: ClipTower, long_segments: LongSegments
) -> tuple[list[Segment], int]:
    """Cut the segments that do not fit the context, or leave them to be truncated.

    Returns:
        The segments, and how many did not fit.
    """
    num_long = 0
    fitted: list[Segment] = []
    for segment in segments:
        is_long = tower.count_word_tokens(segment.text) > tower.max_word_tokens
        num_long += is_long
        if is_long and long_segments == "cut_further":
            fitted += cut_segment(segment, tower.max_word_tokens, tower.count_word_tokens)
        else:
            fitted.append(segment)
    return fitted, num_long


def fit_to_budget(
    sequences: Sequence[TokenIds], policy: SpecialTokenPolicy, pad_token_id: int, token_budget: int
) -> tuple[list[SegmentTokens], int]:
    """Choose the tokens of a caption that enter its merged sequence: the first L.

    Args:
        sequences: The caption's encoded segments, in order.
        policy: Treatment of special tokens.
        pad_token_id: Id of the padding.
        token_budget: L.

    Returns:
        The segments of which at least one token is kept, and the number of dropped tokens.
    """
    fitted: list[SegmentTokens] = []
    dropped, room = 0, token_budget
    for index, sequence in enumerate(sequences):
        positions = kept_positions(sequence, policy, pad_token_id, is_first=index == 0)
        if room > 0:
            fitted.append(SegmentTokens(sequence, positions[:room]))
        dropped += max(len(positions) - room, 0)
        room = max(room - len(positions), 0)
    return fitted, dropped


def report_plans(plans: Sequence[CaptionPlan]) -> TextReport:
    """Collect the counts of a batch."""
    return TextReport(
        num_segments=tuple(plan.num_segments for plan in plans),
        cut_segments=tuple(plan.num_cut for plan in plans),
        dropped_tokens=tuple(plan.num_dropped for plan in plans),
        kept_tokens=tuple(sum(len(s.positions) for s in plan.tokens) for plan in plans),
    )
