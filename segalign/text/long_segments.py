"""Cut segments that do not fit the encoder's context at the best boundary."""

import re
from collections.abc import Callable

from segalign.text.segmenter import Segment

# Characters looked at for one piece: 75 tokens hardly ever span more, and the cost of cutting
# stays proportional to the length of the segment.
_WINDOW = 1024
_CLAUSE_END = re.compile(r"[,;:)\]]\s+|[\u2013\u2014]\s*|[\u3001\uff0c\uff1b\uff1a]\s*")
_BLANKS = re.compile(r"\s+")


def cut_segment(
    segment: Segment, max_word_tokens: int, count_tokens: Callable[[str], int]
) -> list[Segment]:
    """Cut a segment into pieces that fit, losing nothing.

    Each piece is as long as fits and ends, in this order of preference, after clause punctuation
    in its second half, at a blank, or anywhere.

    Args:
        segment: The segment. It comes back alone if it fits.
        max_word_tokens: Tokens that fit besides start and end (CLIP: 75).
        count_tokens: Number of word tokens of a text.

    Returns:
        Pieces whose texts join to ``segment.text`` and whose spans tile the segment's span. Only a
        single character of more than ``max_word_tokens`` tokens can still be too long.
    """
    text = segment.text
    cuts = [0]
    while not _rest_fits(text[cuts[-1] :], max_word_tokens, count_tokens):
        window = text[cuts[-1] : cuts[-1] + _WINDOW]
        cuts.append(cuts[-1] + _piece_length(window, max_word_tokens, count_tokens))
    # A strategy that rewrites text may add characters at the end: spans stay inside the segment.
    ends = [min(segment.start + cut, segment.end) for cut in cuts[1:]] + [segment.end]
    starts = [segment.start, *ends[:-1]]
    texts = [text[cut:next_cut] for cut, next_cut in zip(cuts, [*cuts[1:], None], strict=True)]
    return [Segment(*piece) for piece in zip(texts, starts, ends, strict=True)]


def _rest_fits(rest: str, max_word_tokens: int, count_tokens: Callable[[str], int]) -> bool:
    """Tell whether the rest of a segment is one piece; a single character always is."""
    if len(rest) <= 1:
        return True
    return len(rest) <= _WINDOW and count_tokens(rest) <= max_word_tokens


def _piece_length(window: str, max_word_tokens: int, count_tokens: Callable[[str], int]) -> int:
    """Return the number of characters of the next piece, at least 1."""
    limit = _longest_prefix(window, max_word_tokens, count_tokens)
    head = window[: limit + 1]
    for boundary, earliest in ((_CLAUSE_END, limit // 2), (_BLANKS, 1)):
        ends = [end for m in boundary.finditer(head) if earliest <= (end := m.end()) <= limit]
        if ends and count_tokens(window[: ends[-1]]) <= max_word_tokens:
            return ends[-1]
    return max(limit, 1)


def _longest_prefix(window: str, max_word_tokens: int, count_tokens: Callable[[str], int]) -> int:
    """Find, by bisection, the length of a longest prefix that fits."""
    fits, too_long = 0, len(window) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count_tokens(window[:middle]) <= max_word_tokens:
            fits = middle
        else:
            too_long = middle
    return fits
