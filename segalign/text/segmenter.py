"""Split captions into segments, with lossless character spans.

The spans of a split tile the caption: the first starts at 0, each starts where the one before it
ends, the last ends at the end. A caption always has at least one segment.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import sentencex


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a caption.

    Attributes:
        text: What the encoder reads. ``caption[start:end]``, unless the strategy rewrites text.
        start: First character in the caption.
        end: One past the last character, separators after the segment included.
    """

    text: str
    start: int
    end: int


class Segmenter(Protocol):
    """A splitting strategy."""

    def split(self, caption: str) -> list[Segment]:
        """Split a caption into at least one segment, spans tiling the caption."""
        ...


class SentenceSegmenter:
    """Split into sentences, with the rules of ``sentencex`` and a few for captions.

    Decimals, abbreviations, initials, URLs, ellipses, quotes and the stops of many scripts are
    handled. A list item stays with its number or bullet, a newline ends a segment unless a line
    is merely wrapped, and nothing but punctuation or blanks never is a segment of its own.
    Lines of more than 8192 characters are read in parts and may be cut where two parts meet.
    """

    def split(self, caption: str) -> list[Segment]:
        """Split a caption; ``text`` is exactly ``caption[start:end]``."""
        windows = [window for block in _blocks(caption) for window in _windows(block)]
        pieces = [piece for window in windows for piece in _sentences(window)]
        ends = list(accumulate(map(len, _attach_wordless(pieces)), initial=0))
        spans = pairwise(ends) if len(ends) > 1 else [(0, len(caption))]
        return [Segment(caption[start:end], start, end) for start, end in spans]


class OfficialSegmenter:
    """Split as the official LongAlign code does, oddities included.

    Cuts at the two characters ``"!``, at ``.``, at ``?`` and at the two characters ``;"``; drops
    empty parts and writes ``.`` after each part. Decimals and abbreviations shatter.
    """

    def split(self, caption: str) -> list[Segment]:
        """Split a caption; spans are lossless, ``text`` is rewritten."""
        starts: list[int] = []
        texts: list[str] = []
        part_start = 0
        for stop in [*_OFFICIAL_STOP.finditer(caption), None]:
            part = caption[part_start : stop.start() if stop else len(caption)]
            if part:
                starts.append(part_start)
                texts.append(part + ".")
            part_start = stop.end() if stop else len(caption)
        if not texts:
            return [Segment(caption, 0, len(caption))]
        bounds = [0, *starts[1:], len(caption)]
        return [
            Segment(text, start, end)
            for text, (start, end) in zip(texts, pairwise(bounds), strict=True)
        ]


_OFFICIAL_STOP = re.compile(r'"!|[.?]|;"')

# Long blocks are read in windows: the splitter's time grows with the square of the length where
# quotes do not close or there are no blanks. A window ends at a stop that is beyond doubt, else at
# a blank, else anywhere.
_MAX_BLOCK = 8192
_WINDOW = re.compile(
    r".{1024,2048}(?<=[\u3002\uff01\uff1f])(?![\u3002\uff01\uff1f\u300d\u300f\u201d\u2019\uff09])\s*"
    r"|.{4096,8192}(?<=[a-z]{4}[.!?])\s+(?=[A-Za-z])"
    r"|.{1,8192}(?!\S)\s*"
    r"|.{1,8192}",
    re.DOTALL,
)
_BLANK = re.compile(r"\s")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LINE = re.compile(r"[^\n\r]*[\n\r]*")
_WRAPPED_LINE = re.compile(r"[^\n\r]{39,}[\w,][^\S\n\r]*(?:\r\n|\n|\r)")
# Stops that the splitter misses.
_FURTHER_STOPS = (
    # The ellipsis character before a capital letter, closing and opening quotes between them.
    re.compile(
        r"\u2026[\"'\u2019\u201d\xbb)\]]*\s+"
        r"(?=[\"'\u2018\u201c\xab(\[]*[A-Z\xc0-\xde\u0391-\u03a9\u0400-\u042f])"
    ),
    # A unit after a number, before a capital letter.
    re.compile(r"\d\s?(?:[mcdk]?m|k?g|m?l|s|h|km/h|m/s)\.\s+(?=[A-Z])"),
    # Whole sentences in brackets.
    re.compile(r"(?:^|(?<=[.!?)\]]\s))[(\[][A-Z][^()\[\]]*[.!?][)\]]\s+(?=[\"'\u201c(\[]?[A-Z])"),
    # Before a list number in brackets.
    re.compile(r"[.!?]\s+(?=\[\d{1,3}\]\s)"),
)
_WORD = re.compile(r"\w")
_MARKER = re.compile(
    r"\s*(?:\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{2,4}|[IVX]{2,4})[.)]|\[\d{1,3}\]|[-*\u2022\u2013])\s*"
)
_ABBREVIATION = re.compile(
    r"(?:.*[\s(\d])?(?:approx|avg|ca|ch|dept|eqs?|est|ft|incl|lbs?|max|min|oz|resp|sq|tbsps?|tsps?|vol|yds?)\.\s+",
    re.IGNORECASE | re.DOTALL,
)
_CLOSING_QUOTES = ("\u300d", "\u300f")
_QUOTE_PARTICLE = re.compile("\u3068|\u3063\u3066")  # the Japanese "thus said"


def _blocks(caption: str) -> Iterator[str]:
    """Yield runs of lines: a line break ends a block unless the line is merely wrapped."""
    block: list[str] = []
    for line in filter(None, _LINE.findall(caption)):
        if block and not _is_wrapped(block[-1], line):
            yield "".join(block)
            block = []
        block.append(line)
    if block:
        yield "".join(block)


def _windows(block: str) -> list[str]:
    """Cut a block that is long."""
    return [block] if len(block) <= _MAX_BLOCK else _WINDOW.findall(block)


def _is_wrapped(line: str, next_line: str) -> bool:
    """Tell whether a sentence goes on after a line break, as in text wrapped at a column."""
    return next_line[:1].islower() and bool(_WRAPPED_LINE.fullmatch(line))


def _sentences(window: str) -> list[str]:
    """Split a window into sentences, losslessly."""
    # sentencex fails on some other blanks before a stop and on text that is not UTF-8; both
    # replacements keep the length.
    readable = _SURROGATE.sub("\ufffd", _BLANK.sub(" ", window))
    lengths = map(len, sentencex.segment("en", readable))
    further = (match.end() for stop in _FURTHER_STOPS for match in stop.finditer(readable))
    stops = {*accumulate(lengths), *further}
    ends = [0, *sorted(stops)]
    return _join_torn([window[start:end] for start, end in pairwise(ends)])


def _join_torn(sentences: Sequence[str]) -> list[str]:
    """Join what the splitter tore: list markers, further abbreviations, quotes with a particle."""
    groups: list[list[str]] = []
    for sentence in sentences:
        if groups and _goes_on(groups[-1][-1], sentence):
            groups[-1].append(sentence)
        else:
            groups.append([sentence])
    return ["".join(group) for group in groups]


def _goes_on(piece: str, next_piece: str) -> bool:
    """Tell whether the sentence of a piece goes on in the next one."""
    first = next_piece[:1]
    if _MARKER.fullmatch(piece):
        return True
    if first.islower() or first.isdigit():
        return bool(_ABBREVIATION.fullmatch(piece))
    return bool(_QUOTE_PARTICLE.match(next_piece)) and piece.endswith(_CLOSING_QUOTES)


def _attach_wordless(pieces: Iterable[str]) -> list[str]:
    """Attach pieces without a word to the piece before, at the start to the piece after."""
    groups: list[list[str]] = []
    last_has_word = True
    for piece in pieces:
        has_word = _has_word(piece)
        if groups and not (has_word and last_has_word):
            groups[-1].append(piece)
            last_has_word = last_has_word or has_word
        else:
            groups.append([piece])
            last_has_word = has_word
    return ["".join(group) for group in groups]


def _has_word(piece: str) -> bool:
    """Tell whether a piece holds a letter, a digit or a pictograph."""
    return bool(_WORD.search(piece)) or any(unicodedata.category(char) == "So" for char in piece)
