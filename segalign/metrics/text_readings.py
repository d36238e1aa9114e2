"""The ways in which retrieval reads a caption: whole, and as the mean of its first segments.

Dims: B batch, N segments in the batch, T readings, E joint-embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.errors import ConfigError
from segalign.rewards.segment_scorer import SegmentFeatures

SINGLE = "single"
AVERAGE = "average"


@dataclass(frozen=True)
class TextReadings:
    """Which readings of captions are compared.

    ``single`` is the whole caption, of which the context's worth is read; ``average`` the mean of
    all its segments' unit features; ``first k`` that of its first k segments, or of all if it has
    fewer. Means are not scaled to length 1 again.

    Attributes:
        max_segments: The numbers k, ascending.
    """

    max_segments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that are not positive and ascending.

        Raises:
            ConfigError: If they are not.
        """
        numbers = self.max_segments
        if list(numbers) != sorted({*numbers}) or any(number < 1 for number in numbers):
            raise ConfigError(
                f"expected `max_segments` to be ascending positive numbers; got {list(numbers)}; "
                "try [1, 2, 3, 4, 6, 8]"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Name the readings, T of them."""
        return (SINGLE, *(f"first {number}" for number in self.max_segments), AVERAGE)

    def features(self, whole: Tensor, segments: SegmentFeatures) -> Tensor:
        """Return the features of all readings, in float32 on the CPU, ``(B, T, E)``.

        Args:
            whole: Unit features of the captions, cut at the context, ``(B, E)``.
            segments: Unit features of their segments.
        """
        features = segments.features.detach().float().cpu()
        on_cpu = SegmentFeatures(features, segments.owner.cpu(), segments.texts)
        means = [first_segments_mean(on_cpu, number) for number in self.max_segments]
        return torch.stack([whole.detach().float().cpu(), *means, on_cpu.mean()], dim=1)


def segment_positions(owner: Tensor) -> Tensor:
    """Number the segments of each caption from 0, int64 ``(N,)``.

    Args:
        owner: See ``SegmentFeatures``.
    """
    counts = torch.bincount(owner)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(owner), device=owner.device) - starts[owner]


def first_segments_mean(segments: SegmentFeatures, number: int) -> Tensor:
    """Average the first segments of each caption, at most so many, ``(B, E)``."""
    kept = segment_positions(segments.owner) < number
    return SegmentFeatures(segments.features[kept], segments.owner[kept], []).mean()
