"""The scorers of scenes as rewards that a config can name."""

from dataclasses import dataclass

from segalign.formats.clip_scorer import Scorer
from segalign.rewards.zoo import ClipSettings, TextPart
from segalign.scenes.scorers import HeldOutScorer, ScenesScorer


@dataclass(frozen=True, kw_only=True)
class ScenesReward(ClipSettings):
    """The benchmark's preference model; its other settings are those of all CLIP-type rewards.

    Args:
        world: World of the images; the shipped weights are of ``3x3``.
        weights: ``preference``, which ``configs/scenes/preference.yaml`` has trained; ``shipped``,
            which it starts from; ``random``; or a run (or checkpoint) that trained one.
    """

    text: TextPart = "segments"
    world: str = "3x3"
    weights: str = "preference"

    def load_scorer(self) -> Scorer:
        """See ``ClipSettings``."""
        return ScenesScorer(world=self.world, weights=self.weights).load()


@dataclass(frozen=True, kw_only=True)
class HeldOutScenesReward(ClipSettings):
    """The benchmark's second scorer, of another architecture, which watches training.

    Args:
        world: World of the images; the shipped weights are of ``3x3``.
        weights: ``shipped``, ``random``, or a run (or checkpoint) that trained one.
    """

    text: TextPart = "segments"
    world: str = "3x3"
    weights: str = "shipped"

    def load_scorer(self) -> Scorer:
        """See ``ClipSettings``."""
        return HeldOutScorer(world=self.world, weights=self.weights).load()
