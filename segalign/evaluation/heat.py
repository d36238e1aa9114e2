"""Colours of segments by their scores: seven steps from the low ones to the high ones shown."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

NUM_STEPS: Final = 7
# The step of what has no score.
NO_STEP: Final = -1
_OUTER: Final = 0.05


@dataclass(frozen=True)
class HeatScale:
    """Maps scores to steps.

    Attributes:
        low: Scores below have step 0, too.
        high: Scores above have the last step, too.
    """

    low: float
    high: float

    @classmethod
    def of(cls, scores: Iterable[float]) -> "HeatScale":
        """Span all but the outer 5 % on both sides, of scores that are finite; 0 to 1 of none."""
        found = sorted(score for score in scores if math.isfinite(score))
        left_out = round(_OUTER * (len(found) - 1))
        return cls(found[left_out], found[-1 - left_out]) if found else cls(0.0, 1.0)

    def step(self, score: float) -> int:
        """Return the step of a score, 0 to 6; `NO_STEP` if it is not finite."""
        if not math.isfinite(score):
            return NO_STEP
        if self.high <= self.low:
            return NUM_STEPS // 2
        share = (score - self.low) / (self.high - self.low)
        return min(max(int(share * NUM_STEPS), 0), NUM_STEPS - 1)

    def labels(self) -> list[str]:
        """Name the steps, for a legend."""
        width = (self.high - self.low) / NUM_STEPS
        edges = [f"{self.low + width * number:.3f}" for number in range(1, NUM_STEPS)]
        between = [f"{low} to {high}" for low, high in pairwise(edges)]
        return [f"below {edges[0]}", *between, f"above {edges[-1]}"]


@dataclass(frozen=True)
class HeatSegment:
    """A piece of a caption on a page.

    Attributes:
        text: Its characters.
        score: Its score, for people.
        step: Of its colour.
        is_lowest: Whether no segment of its caption scores less, and one scores more.
    """

    text: str
    score: str
    step: int
    is_lowest: bool

    @property
    def width(self) -> int:
        """Characters, at least one: the strip's cells are as wide."""
        return max(len(self.text), 1)


def heat_segments(
    caption: str,
    spans: Sequence[Sequence[int]],
    scores: Sequence[float | None],
    scale: HeatScale,
) -> list[HeatSegment]:
    """Cut a caption into coloured segments, whose texts join to it.

    Args:
        caption: The caption.
        spans: First and end character of each segment; they tile the caption.
        scores: Of each segment.
        scale: Colours.
    """
    known = [math.nan if score is None else score for score in scores]
    finite = [score for score in known if math.isfinite(score)]
    lowest = min(finite, default=math.nan)
    differ = bool(finite) and max(finite) > lowest
    return [
        HeatSegment(
            caption[start:end],
            f"{score:.3f}" if math.isfinite(score) else "-",
            scale.step(score),
            differ and score == lowest,
        )
        for (start, end), score in zip(spans, known, strict=True)
    ]
