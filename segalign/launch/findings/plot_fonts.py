"""Fonts for labels in any script: matplotlib's own has no Chinese, Japanese, Korean or Hindi."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from warnings import catch_warnings, filterwarnings

from matplotlib import rc_context
from matplotlib.font_manager import FontEntry, FontProperties, fontManager, get_font

_FIRST: Final = "DejaVu Sans"
# Fonts that have a box for every character, and no character.
_NO_FONTS: Final = ("last resort", "lastresort", "fallback")


@dataclass(frozen=True)
class ChosenFonts:
    """Fonts that together have the characters of some labels.

    Attributes:
        families: Their names, in the order in which a character is looked for.
        missing: Characters that no font of this machine has.
    """

    families: Sequence[str]
    missing: str = ""

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw with them; what has been drawn keeps them."""
        with rc_context({"font.family": list(self.families)}):
            yield


def choose_fonts(texts: Iterable[str]) -> ChosenFonts:
    """Find fonts for texts; that of plots without them comes first."""
    return _choose("".join(sorted({*"".join(texts)})))


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Keep matplotlib from warning of each missing character, at each place where it is drawn."""
    with catch_warnings():
        filterwarnings("ignore", message=r"(?s)Glyph \d+ .* missing from")
        yield


def missing_line(fonts: ChosenFonts) -> str:
    """Say which characters are drawn as boxes; empty if none is."""
    if not fonts.missing:
        return ""
    return (
        f"plots show boxes for `{fonts.missing}`, which no font of this machine has; install one "
        "that does, such as Noto Sans CJK, and draw again"
    )


@lru_cache(maxsize=16)
def _choose(characters: str) -> ChosenFonts:
    families = [_FIRST]
    missing = {one for one in characters if one.isprintable() and not one.isspace()}
    missing -= _glyphs(fontManager.findfont(FontProperties(family=_FIRST)), missing)
    # Upright ones of common weight first, so that labels look like one text.
    for entry in sorted(fontManager.ttflist, key=_oddness):
        if not missing:
            break
        if entry.name in families or any(word in entry.name.lower() for word in _NO_FONTS):
            continue
        if found := _glyphs(entry.fname, missing):
            families.append(entry.name)
            missing -= found
    return ChosenFonts(tuple(families), "".join(sorted(missing)))


def _oddness(entry: FontEntry) -> tuple[bool, bool]:
    return entry.style != "normal", entry.weight != 400


def _glyphs(file: str, characters: set[str]) -> set[str]:
    """Return those of some characters that a font has; none if it cannot be read."""
    try:
        font = get_font(file)
    except (OSError, RuntimeError):
        return set()
    return {one for one in characters if font.get_char_index(ord(one)) != 0}
