"""One page that shows each prompt, how it was split, and its images.

The page needs no network and no script: it refers to nothing but the images beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from segalign.generation.image_folder import printable

TEMPLATE = "contact_sheet.html.jinja"
_MAX_SHOWN_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class MarkedSegment:
    """A piece of a prompt as the encoder reads it.

    Attributes:
        text: Its characters.
        num_tokens: Its word tokens.
        num_dropped: How many of them the generator never sees.
        goes_on: Whether it was cut off the piece before, which did not fit the encoder's context.
    """

    text: str
    num_tokens: int
    num_dropped: int
    goes_on: bool


@dataclass(frozen=True, slots=True)
class SheetEntry:
    """One prompt of the page.

    Attributes:
        name: Its id.
        segments: Its pieces; their texts join to the prompt.
        images: File names and captions of its images.
        num_hidden: Characters that are left out of the page.
    """

    name: str
    segments: Sequence[MarkedSegment]
    images: Sequence[tuple[str, str]]
    num_hidden: int = 0

    @property
    def num_tokens(self) -> int:
        """Word tokens of the prompt."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_dropped(self) -> int:
        """Word tokens that the generator never sees."""
        return sum(segment.num_dropped for segment in self.segments)

    @property
    def num_cut(self) -> int:
        """Segments that did not fit the encoder's context."""
        return sum(
            after.goes_on and not before.goes_on for before, after in pairwise(self.segments)
        )


def sheet_entries(
    records: Sequence[Mapping[str, Any]], mark: Callable[[str], Sequence[MarkedSegment]]
) -> list[SheetEntry]:
    """Group the records of images by prompt.

    Args:
        records: Records of ``images.jsonl``, sorted by sample.
        mark: Splits a prompt into marked segments.
    """
    entries = []
    for (sample_id, prompt), group in groupby(records, lambda r: (r["sample_id"], r["prompt"])):
        images = list(group)
        name = images[0].get("id") or str(sample_id)
        entries.append(
            SheetEntry(
                name, mark(prompt), [(image["file"], f"seed {image['seed']}") for image in images]
            )
        )
    return entries


def render_sheet(entries: Sequence[SheetEntry], settings: Mapping[str, Any], title: str) -> str:
    """Write the page.

    Args:
        entries: The prompts.
        settings: Names and values at the head of the page.
        title: Its title.

    Returns:
        HTML that holds no text of a prompt unescaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        entries=[_shorten(entry) for entry in entries], settings=settings, title=title
    )
    return printable(page)


def _shorten(entry: SheetEntry) -> SheetEntry:
    """Leave out the end of a prompt that no page can show; the counts stay those of the whole."""
    room, shown, hidden = _MAX_SHOWN_CHARACTERS, [], 0
    for segment in entry.segments:
        text = segment.text[: max(room, 0)]
        room -= len(segment.text)
        hidden += len(segment.text) - len(text)
        shown.append(replace(segment, text=text))
    return replace(entry, segments=shown, num_hidden=hidden)
