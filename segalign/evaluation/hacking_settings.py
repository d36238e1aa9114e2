"""What is watched for signs that a run climbs its reward at the cost of its images."""

from collections.abc import Sequence
from dataclasses import dataclass

from segalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HackingSettings:
    """What is watched, by the names that an evaluation has for it, and how much is too much.

    Args:
        reward: The reward that is trained on.
        held_out: How names of rewards that are not trained on begin; their parts are left out.
        diversity: How the name of the mean distance of images of one caption ends; of several the
            first in alphabetical order is meant.
        drift: How that of the mean distance of images from those of the start ends, at equal
            captions and noise, as a share of the start's diversity.
        cross_prompt: How alike images of different captions are, at most 1.
        to_v: How alike images are to the common direction of captions.
        details: Measures of detail, positive.
        patience: Evaluations in a row, at least 1, before a run is suspected.
        num_errors: Standard errors that a rise or fall of a reward must exceed.
        min_fall: Least fall of a held-out reward, in standard deviations over the start's captions.
        min_diversity: Least diversity, as a share of the start's.
        max_drift: Largest drift.
        max_cross_prompt: Largest rise of cross-prompt similarity, as a share of what is left to 1.
        max_to_v: Largest rise of the similarity to V, in standard deviations over the start's
            captions.
        max_detail: Largest factor by which detail may rise or fall, above 1.

    Raises:
        ConfigError: If a threshold cannot be.
    """

    reward: str = "monitor/reward"
    held_out: str = "monitor/held_out/"
    diversity: str = "_diversity"
    drift: str = "_drift_ratio"
    cross_prompt: str = "cross_prompt_similarity"
    to_v: str = "image_to_v_similarity"
    details: Sequence[str] = ("high_frequency", "sharpness")
    patience: int = 2
    num_errors: float = 3.0
    min_fall: float = 0.1
    min_diversity: float = 0.7
    max_drift: float = 0.8
    max_cross_prompt: float = 0.1
    max_to_v: float = 2.0
    max_detail: float = 3.5

    def __post_init__(self) -> None:
        """Check the thresholds."""
        if self.patience < 1 or self.max_detail <= 1:
            raise ConfigError(
                "expected `patience` of at least 1 and `max_detail` above 1; got "
                f"{self.patience} and {self.max_detail}; change them"
            )
