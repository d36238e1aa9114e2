"""Decide which tokens of a caption's segments are encoded and kept.

Dims: N segments, L token budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from segalign.text.clip_tower import ClipTower
from segalign.text.conditioning import TextReport
from segalign.text.long_segments import cut_segment
from segalign.text.segmenter import Segment
from segalign.text.special_tokens import SpecialTokenPolicy, count_kept, kept_positions
from segalign.text.tokenizer import TokenIds

LongSegments = Literal["cut_further", "truncate"]
OverBudget = Literal["cut", "proportional"]

# Longer texts are judged by their start first, so that a huge one is not read just to be cut.
_LONG_CHARS = 4096


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
    over_budget: OverBudget = "cut",
) -> CaptionPlan:
    """Tokenize the segments of a caption and choose the tokens to keep.

    Args:
        segments: The segments. Those without a single word are left out, unless all are.
        tower: The encoder that will read them.
        policy: Treatment of special tokens.
        token_budget: L.
        long_segments: Treatment of segments that do not fit the context.
        over_budget: Treatment of a caption of more than L tokens: see :func:`share_budget`.
    """
    found = _FoundTokens(tower, policy, token_budget)
    num_cut = 0
    for segment in segments:
        pieces, is_long = _fit_segment(segment, tower, long_segments)
        num_cut += is_long
        for piece in pieces:
            if word_ids := tower.word_ids(piece.text):
                found.add(word_ids)
    if found.num_segments == 0:
        found.add(())
    shares = share_budget(found.counts, token_budget, over_budget)
    num_dropped = found.num_tokens - sum(shares)
    return CaptionPlan(found.choose(shares), found.num_segments, num_cut, num_dropped)


def fit_to_context(
    segments: Sequence[Segment], tower: ClipTower, long_segments: LongSegments
) -> list[Segment]:
    """Cut the segments that do not fit the context, or leave them to be truncated."""
    return [
        piece for segment in segments for piece in _fit_segment(segment, tower, long_segments)[0]
    ]


def share_budget(counts: Sequence[int], token_budget: int, over_budget: OverBudget) -> list[int]:
    """Divide the token budget among the segments of a caption.

    ``cut``: the first L tokens stay (official). ``proportional``: each segment keeps its first
    tokens, in number proportional to its length (rounded by largest remainders, earlier segments
    first among equal ones) and at least one. Where L is smaller than the number of segments there
    is no share worth keeping, and ``proportional`` does what ``cut`` does.

    Args:
        counts: Tokens of each segment that the policy keeps, at least 1 each.
        token_budget: L, at least 1.
        over_budget: The choice.

    Returns:
        Tokens that stay of each segment, at most its count; their sum is L, or that of the counts
        if it is smaller.
    """
    if over_budget == "proportional" and len(counts) <= token_budget < sum(counts):
        return _proportional_shares(counts, token_budget)
    starts = accumulate(counts, initial=0)
    return [
        min(max(token_budget - start, 0), count)
        for start, count in zip(starts, counts, strict=False)
    ]


def report_plans(plans: Sequence[CaptionPlan]) -> TextReport:
    """Collect the counts of a batch."""
    return TextReport(
        num_segments=tuple(plan.num_segments for plan in plans),
        cut_segments=tuple(plan.num_cut for plan in plans),
        dropped_tokens=tuple(plan.num_dropped for plan in plans),
        kept_tokens=tuple(sum(len(s.positions) for s in plan.tokens) for plan in plans),
    )


def _proportional_shares(counts: Sequence[int], token_budget: int) -> list[int]:
    """Divide a budget smaller than the sum of the counts, but not than their number."""
    shares = [1] * len(counts)
    # The shortest segments, whose share would be less than one token, get one of the budget each.
    by_length = sorted(range(len(counts)), key=lambda index: counts[index])
    room, num_tokens = token_budget, sum(counts)
    while counts[by_length[0]] * room < num_tokens:
        num_tokens -= counts[by_length.pop(0)]
        room -= 1
    for index in by_length:
        shares[index] = counts[index] * room // num_tokens
    num_left = token_budget - sum(shares)
    by_remainder = sorted(
        by_length, key=lambda index: (-(counts[index] * room % num_tokens), index)
    )
    for index in by_remainder[:num_left]:
        shares[index] += 1
    return shares


def _fit_segment(
    segment: Segment, tower: ClipTower, long_segments: LongSegments
) -> tuple[list[Segment], bool]:
    """Cut a segment if it does not fit and is to be cut; tell whether it does not fit."""
    is_long = _is_long(segment.text, tower)
    if is_long and long_segments == "cut_further":
        return cut_segment(segment, tower.max_word_tokens, tower.count_word_tokens), True
    return [segment], is_long


def _is_long(text: str, tower: ClipTower) -> bool:
    """Tell whether a text has more word tokens than fit."""
    # A longer text has no fewer tokens than its start; the last word of the start, which may be
    # torn, is far behind the limit.
    max_word_tokens = tower.max_word_tokens
    starts_long = (
        len(text) > _LONG_CHARS
        and tower.count_word_tokens(text[:_LONG_CHARS]) > 2 * max_word_tokens
    )
    return starts_long or tower.count_word_tokens(text) > max_word_tokens


@dataclass
class _FoundTokens:
    """The tokens of a caption that could be kept.

    Attributes:
        counts: Tokens that the policy keeps of each segment that fits; segments without one are
            left out.
        num_tokens: Tokens that the policy would keep if all of them fitted.
        num_segments: Segments added.
    """

    tower: ClipTower
    policy: SpecialTokenPolicy
    token_budget: int
    counts: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_segments: int = 0
    _sequences: list[TokenIds] = field(default_factory=list)

    def add(self, word_ids: TokenIds) -> None:
        """Add a segment."""
        fitting = word_ids[: self.tower.max_word_tokens]
        count = self._count(fitting)
        self.num_tokens += count if fitting is word_ids else self._count(word_ids)
        self.num_segments += 1
        if count == 0:
            return
        self.counts.append(count)
        if len(self._sequences) < self.token_budget:  # behind L segments there is no room
            self._sequences.append(fitting)

    def choose(self, shares: Sequence[int]) -> list[SegmentTokens]:
        """Keep the first tokens of each segment, as many as its share."""
        chosen = []
        for index, (word_ids, share) in enumerate(zip(self._sequences, shares, strict=False)):
            input_ids = self.tower.wrap(word_ids)
            positions = kept_positions(
                input_ids, self.policy, self.tower.pad_token_id, is_first=index == 0
            )
            if share:
                chosen.append(SegmentTokens(input_ids, positions[:share]))
        return chosen

    def _count(self, word_ids: TokenIds) -> int:
        """Count what the policy keeps of the next segment."""
        is_first = self.num_segments == 0
        return count_kept(word_ids, self.policy, self.tower.pad_token_id, is_first=is_first)
