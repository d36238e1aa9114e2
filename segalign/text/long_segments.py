"""Cut text that does not fit the encoder's context at the best boundary."""

import re
from collections.abc import Callable, Iterator, Sequence

from segalign.text.segmenter import Segment

CountTokens = Callable[[str], int]
# What may end a piece, and the part of the longest possible piece that it must not leave unused.
Boundary = tuple[re.Pattern[str], float]

BLANKS = re.compile(r"\s+")
_CLAUSE_END = re.compile(r"[,;:)\]]\s+|[\u2013\u2014]\s*|[\u3001\uff0c\uff1b\uff1a]\s*")
_BOUNDARIES: Sequence[Boundary] = ((_CLAUSE_END, 0.5), (BLANKS, 1.0))
_FREE_BLANKS = re.compile(r"[ \t\n\r]+")  # cleaning makes a character of some other blanks
_WORD = re.compile(r"\s*(\S+)\s*")

# Characters looked at for one piece: tokens hardly ever are longer on average, and the cost of
# cutting stays proportional to the length of the text.
_MIN_REACH = 64
_REACH_PER_TOKEN = 14


def cut_segment(segment: Segment, max_word_tokens: int, count_tokens: CountTokens) -> list[Segment]:
    """Cut a segment into pieces that fit, losing nothing.

    Each piece is as long as fits and ends, in this order of preference, after clause punctuation
    in its second half, at a blank, or anywhere.

    Args:
        segment: The segment. It comes back alone if it fits.
        max_word_tokens: Tokens that fit besides start and end (CLIP: 75).
        count_tokens: Number of word tokens of a text; blanks are none.

    Returns:
        Pieces whose texts join to ``segment.text`` and whose spans tile the segment's span. Only a
        single character of more than ``max_word_tokens`` tokens can still be too long.
    """
    text = segment.text
    cuts = list(cut_points(text, max_word_tokens, count_tokens, _BOUNDARIES))
    # A strategy that rewrites text may add characters at the end: spans stay inside the segment.
    ends = [min(segment.start + cut, segment.end) for cut in cuts] + [segment.end]
    starts = [segment.start, *ends[:-1]]
    texts = [text[cut:next_cut] for cut, next_cut in zip([0, *cuts], [*cuts, None], strict=True)]
    return [Segment(*piece) for piece in zip(texts, starts, ends, strict=True)]


def cut_points(
    text: str, max_word_tokens: int, count_tokens: CountTokens, boundaries: Sequence[Boundary]
) -> Iterator[int]:
    """Yield the positions inside a text at which pieces that fit begin, in time linear in it.

    Args:
        text: The text.
        max_word_tokens: Tokens that fit in a piece.
        count_tokens: Number of word tokens of a text; blanks are none.
        boundaries: Where to cut, the best first; where none is, a cut is made anywhere.
    """
    reach = _MIN_REACH + _REACH_PER_TOKEN * max_word_tokens
    start = _skip_blanks(text, 0)
    while not _rest_fits(text, start, reach, max_word_tokens, count_tokens):
        window = text[start : start + reach]
        start += _piece_length(window, max_word_tokens, count_tokens, boundaries)
        start = _skip_blanks(text, start)  # those that reach beyond the window
        if start == len(text):
            return
        yield start


def _skip_blanks(text: str, start: int) -> int:
    """Return the position behind any blanks."""
    blanks = _FREE_BLANKS.match(text, start)
    return blanks.end() if blanks else start


def _rest_fits(
    text: str, start: int, reach: int, max_word_tokens: int, count_tokens: CountTokens
) -> bool:
    """Tell whether the rest of a text is one piece; a single character always is."""
    num_chars = len(text) - start
    if num_chars <= 1:
        return True
    return num_chars <= reach and count_tokens(text[start:]) <= max_word_tokens


def _piece_length(
    window: str, max_word_tokens: int, count_tokens: CountTokens, boundaries: Sequence[Boundary]
) -> int:
    """Return the number of characters of the next piece, at least 1."""
    limit = _sum_of_words(window, max_word_tokens, count_tokens)
    for end in [*_boundary_ends(window, limit, boundaries), limit]:
        # Words are counted one by one; cleaning may see more in several (broken encodings).
        if end > 0 and count_tokens(window[:end]) <= max_word_tokens:
            return end
    longest, _ = _longest_prefix(window, max_word_tokens, count_tokens)
    return max(longest, 1)


def _boundary_ends(window: str, limit: int, boundaries: Sequence[Boundary]) -> Iterator[int]:
    """Yield the end of the last boundary of each kind that does not come too early."""
    head = window[: limit + 1]
    for pattern, max_unused in boundaries:
        earliest = max(limit - int(max_unused * limit), 1)
        ends = [end for m in pattern.finditer(head) if earliest <= (end := m.end()) <= limit]
        if ends:
            yield ends[-1]


def _sum_of_words(window: str, max_word_tokens: int, count_tokens: CountTokens) -> int:
    """Count the characters of the words that fit, and of a part of a word that never fits whole."""
    num_tokens = end = 0
    for word in _WORD.finditer(window):
        length, num_more = _longest_prefix(word[1], max_word_tokens, count_tokens)
        if length < len(word[1]):
            if num_tokens:
                room = max_word_tokens - num_tokens
                length, _ = _longest_prefix(word[1], room, count_tokens)
            return word.start(1) + length
        num_tokens += num_more
        if num_tokens > max_word_tokens:
            return end
        end = word.end()
    return len(window)


def _longest_prefix(text: str, max_word_tokens: int, count_tokens: CountTokens) -> tuple[int, int]:
    """Find a longest prefix that fits; return its number of characters and of tokens."""
    fits, num_fits = 0, 0
    too_long, num_too_long = len(text) + 1, 0
    probe, num_probes = max_word_tokens, 0
    while too_long - fits > 1:
        probe = min(max(probe, fits + 1), too_long - 1)
        num_tokens = count_tokens(text[:probe])
        num_probes += 1
        if num_tokens <= max_word_tokens:
            fits, num_fits = probe, num_tokens
        else:
            too_long, num_too_long = probe, num_tokens
        # Every third time bisect, which bounds the number of probes; else extra- or interpolate.
        if num_probes % 3 == 0:
            probe = (fits + too_long) // 2
        elif num_too_long == 0:
            probe = fits * (max_word_tokens + 1) // max(num_fits, 1)
        else:
            room, num_between = max_word_tokens + 1 - num_fits, num_too_long - num_fits
            probe = fits + room * (too_long - fits) // num_between
    return fits, num_fits
