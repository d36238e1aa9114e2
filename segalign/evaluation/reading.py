"""What one evaluation has found, and how much of the difference to another is noise.

Captions and noise of the images are the same at every evaluation of a run. So differences are taken
caption by caption, whose images are no independent draws.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from segalign.metrics.score_groups import finite, mean


@dataclass(frozen=True)
class Reading:
    """What an evaluation has found.

    Attributes:
        step: Optimizer steps so far.
        values: Means by name.
        per_image: By name, a value for each image, None where it has none; those of a caption are
            beside each other.
        images_per_caption: Images of each caption.
    """

    step: int
    values: Mapping[str, float]
    per_image: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    images_per_caption: int = 1

    def value(self, name: str) -> float | None:
        """Return a mean, if it was measured and is finite."""
        found = self.values.get(name)
        return None if found is None or not math.isfinite(found) else float(found)

    def ending(self, end: str) -> list[str]:
        """Return the first name, in alphabetical order, that ends so; in a list, perhaps empty."""
        return sorted(name for name in self.values if name.endswith(end))[:1]

    def of_captions(self, name: str) -> list[float | None]:
        """Return the mean over each caption's images; None unless all of them have a value."""
        values, size = self.per_image.get(name, ()), self.images_per_caption
        groups = [values[start : start + size] for start in range(0, len(values), size)]
        return [_mean_or_none(group) for group in groups]


def paired_error(first: Sequence[float | None], second: Sequence[float | None]) -> float:
    """Return the standard error of the mean difference over captions.

    Args:
        first: A value for each caption.
        second: Another, of the same captions.

    Returns:
        The error over captions that have both; 0 if fewer than two do, so that any difference
        exceeds it.
    """
    if len(first) != len(second):
        return 0.0
    pairs = zip(first, second, strict=True)
    differences = [one - other for one, other in pairs if one is not None and other is not None]
    if len(differences) < 2:
        return 0.0
    return statistics.stdev(differences) / math.sqrt(len(differences))


def spread(values: Sequence[float | None]) -> float:
    """Return the standard deviation over captions; 0 if fewer than two have a value."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else 0.0


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = finite(values)
    return mean(known) if known and len(known) == len(values) else None
