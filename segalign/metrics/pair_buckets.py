"""Sort preference pairs by the length of the caption and the place of the fact in question."""

from collections.abc import Mapping
from typing import Any, Final

from segalign.errors import DataError
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.text.segmenter import Segmenter
from segalign.text.tokenizer import CONTEXT_LENGTH, word_token_ids

ALL: Final = "all"
LENGTHS: Final = ("length/1-77", "length/78-154", "length/155-308", "length/over_308")
FACT_PLACES: Final = ("within_77", "across_77", "past_77")
SEGMENT_GROUPS: Final = ("1", "2-3", "4-7", "8+")
# The same as parts of log keys.
SEGMENT_KEYS: Final = ("1", "2-3", "4-7", "from_8")
FACT_SEGMENTS: Final = tuple(f"fact_in_segment/{key}" for key in SEGMENT_KEYS)
BUCKETS: Final = (ALL, *LENGTHS, *FACT_PLACES, *FACT_SEGMENTS)

_LONGEST: Final = (77, 154, 308)
_FIRST_SEGMENTS: Final = (1, 3, 7)
_LAST_READ: Final = CONTEXT_LENGTH - 2  # position 0 is the start token, 76 the end token


def pair_buckets(
    scorer: SegmentScorer, segmenter: Segmenter, caption: str, metadata: Mapping[str, Any]
) -> tuple[str, ...]:
    """Name the buckets that a pair belongs to, out of ``BUCKETS``.

    Args:
        scorer: Tokenizes.
        segmenter: Splits.
        caption: The pair's caption.
        metadata: The pair's metadata; ``edited: {"start": int, "end": int, ...}`` are the
            characters of the sentence that one of the images contradicts. Pairs without it belong
            to no bucket of facts.

    Raises:
        DataError: If ``edited`` names no characters of the caption.
    """
    buckets = [ALL, length_bucket(scorer, caption)]
    span = _edited_span(caption, metadata)
    if span is not None:
        buckets.append(fact_place(scorer, caption, *span))
        buckets.append(fact_segment(scorer, segmenter, caption, span[0]))
    return tuple(buckets)


def length_bucket(scorer: SegmentScorer, caption: str) -> str:
    """Sort a caption by its tokens, start and end included."""
    return bucket_of_length(_count_tokens(scorer, caption) + 2)


def bucket_of_length(num_tokens: int) -> str:
    """Sort a number of tokens, start and end included."""
    return LENGTHS[sum(num_tokens > longest for longest in _LONGEST)]


def fact_place(scorer: SegmentScorer, caption: str, start: int, end: int) -> str:
    """Sort the characters ``start:end`` by what a 77-position encoder reads of them.

    With the start token at position 0, it reads the positions 1 to 75 of a longer caption:
    ``within_77`` ends there, ``past_77`` begins behind, ``across_77`` does neither.
    """
    if _count_tokens(scorer, caption[:end]) <= _LAST_READ:
        return FACT_PLACES[0]
    is_past = _count_tokens(scorer, caption[:start]) >= _LAST_READ
    return FACT_PLACES[2] if is_past else FACT_PLACES[1]


def fact_segment(scorer: SegmentScorer, segmenter: Segmenter, caption: str, start: int) -> str:
    """Sort a character by the number of the segment, as it is scored, that holds it."""
    pieces = scorer.pieces(caption, segmenter)
    before = sum(piece.end <= start for piece in pieces)
    return FACT_SEGMENTS[segment_group(before)]


def segment_group(position: int) -> int:
    """Return the index in ``SEGMENT_GROUPS`` of a segment, counted from 0."""
    return sum(position + 1 > last for last in _FIRST_SEGMENTS)


def _count_tokens(scorer: SegmentScorer, text: str) -> int:
    """Count word tokens; starts of captions are not worth the tower's cache."""
    return len(word_token_ids(text, scorer.tower.tokenizer, scorer.tower.cleaning))


def _edited_span(caption: str, metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the characters that ``edited`` names.

    Raises:
        DataError: If it names none.
    """
    edited = metadata.get("edited")
    if edited is None:
        return None
    span = (edited.get("start"), edited.get("end")) if isinstance(edited, Mapping) else edited
    if isinstance(span, tuple) and all(type(place) is int for place in span):
        start, end = span
        if 0 <= start < end <= len(caption):
            return start, end
    raise DataError(
        f"expected `edited` of a pair to hold `start` and `end`, characters of its caption of "
        f"{len(caption)}; got {str(edited)[:60]}; mend the shards, or leave it out"
    )
