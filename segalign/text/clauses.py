"""Split captions into clauses."""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from segalign.errors import ConfigError
from segalign.text.segmenter import Segment, SentenceSegmenter


class ClauseSegmenter:
    """Split into sentences, and these after commas, semicolons, colons and dashes.

    A separator inside a number (1,000 or 3:45 or 10 - 20) or a URL does not count, nor does a
    hyphen or a tight en dash. The separators of Chinese, Japanese and Arabic count too. A clause
    of fewer than ``min_words`` words joins the next one, at the end of a sentence the one before,
    so that lists do not shatter.

    Args:
        min_words: Words that a clause has at least, unless its sentence has fewer. A character of
            a script without blanks between words counts as one.

    Raises:
        ConfigError: If ``min_words`` is not an integer of at least 1.
    """

    def __init__(self, min_words: int = 3) -> None:
        if type(min_words) is not int or min_words < 1:
            raise ConfigError(
                f"`min_words` must be an integer of at least 1; got {min_words!r}; the default is 3"
            )
        self.min_words = min_words
        self._sentences = SentenceSegmenter()

    def split(self, caption: str) -> list[Segment]:
        """Split a caption; ``text`` is exactly ``caption[start:end]``."""
        return [
            clause
            for sentence in self._sentences.split(caption)
            for clause in self._split_sentence(sentence)
        ]

    def _split_sentence(self, sentence: Segment) -> list[Segment]:
        """Cut a sentence into clauses that are long enough."""
        bounds = [0, *_boundaries(sentence.text), len(sentence.text)]
        pieces = [sentence.text[start:end] for start, end in pairwise(bounds)]
        clauses = _join_short(pieces, self.min_words)
        ends = accumulate(map(len, clauses), initial=sentence.start)
        spans = pairwise(ends)
        return [Segment(text, *span) for text, span in zip(clauses, spans, strict=True)]


_BOUNDARY_OR_URL = re.compile(
    r"""
    (?P<url> (?:https?://|www\.) [!-~]* (?<![,;:]) )
    | [,;:\u060c\u061b] ["'\u2019\u201d\xbb)\]]* \s+        # a blank follows, maybe after a quote
    | (?P<tight>
        [\u2014\u2015]+ \s*                                 # long dashes
        | (?<=\s) (?:[-\u2013]|--) \s+                      # short ones between blanks
        | (?<=\w) -- (?=\w)
        | [\uff0c\uff1b\uff1a\u3001] [\u300d\u300f\u201d\u2019\uff09]* \s*
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_NO_BLANKS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # CJK
_WORD = re.compile(rf"[{_NO_BLANKS}]|[^\W{_NO_BLANKS}][^\s{_NO_BLANKS}]*")


def _boundaries(sentence: str) -> Iterator[int]:
    """Yield the positions inside a sentence at which clauses begin."""
    for match in _BOUNDARY_OR_URL.finditer(sentence):
        joins = match["url"] or (match["tight"] and _joins_digits(sentence, *match.span()))
        if not joins and match.end() < len(sentence):
            yield match.end()


def _joins_digits(sentence: str, start: int, end: int) -> bool:
    """Tell whether a separator stands between two digits, blanks aside."""
    before = sentence[max(start - 2, 0) : start].rstrip()
    return before[-1:].isdigit() and sentence[end : end + 1].isdigit()


def _join_short(pieces: Sequence[str], min_words: int) -> list[str]:
    """Join pieces of too few words to the next one, the last one to the one before."""
    groups: list[list[str]] = []
    num_words = min_words
    for piece in pieces:
        if num_words >= min_words:
            groups.append([])
            num_words = 0
        groups[-1].append(piece)
        num_words += len(_WORD.findall(piece))
    if num_words < min_words and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    return ["".join(group) for group in groups]
