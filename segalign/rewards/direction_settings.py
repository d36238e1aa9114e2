"""Name an estimate of the common direction in a config; nothing is read before ``build``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from segalign.rewards.batch_directions import BatchDirection, EmaDirection, check_decay
from segalign.rewards.common_direction import CommonDirection, CorpusDirection
from segalign.rewards.direction_checks import (
    check_batch_estimate,
    check_direction,
    describe_text,
    text_digest,
)
from segalign.rewards.segment_scorer import SegmentScorer


class DirectionSource(Protocol):
    """Names an estimate of the common direction."""

    def build(self, scorer: SegmentScorer, *, num_captions: int) -> CommonDirection:
        """Make the estimate, or read it.

        Args:
            scorer: What it is used with, its weights as they were read.
            num_captions: Captions of one call: a rank's batch times the ranks.

        Raises:
            ConfigError: If it cannot work.
            DataError: If it does not fit the scorer.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CorpusEstimate:
    """The direction of many captions, from a file.

    Args:
        file: What ``python main.py direction estimate`` wrote.
    """

    file: str

    def build(self, scorer: SegmentScorer, *, num_captions: int) -> CommonDirection:
        """See ``DirectionSource``."""
        direction = CorpusDirection.load(Path(self.file))
        check_direction(direction, text_digest(scorer), describe_text(scorer.segmenter))
        return direction


@dataclass(frozen=True, kw_only=True)
class EmaEstimate:
    """The direction of a moving average of batches.

    Args:
        decay: Decay of the average per batch, in [0, 1).
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        check_decay(self.decay)

    def build(self, scorer: SegmentScorer, *, num_captions: int) -> CommonDirection:
        """See ``DirectionSource``."""
        return EmaDirection(self.decay)


@dataclass(frozen=True)
class BatchEstimate:
    """The direction of each batch over all ranks, as the official code has it."""

    def build(self, scorer: SegmentScorer, *, num_captions: int) -> CommonDirection:
        """See ``DirectionSource``; a batch of one caption is refused here, and when it is met."""
        check_batch_estimate(num_captions)
        return BatchDirection(refuse_single=True)
