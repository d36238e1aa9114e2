"""The scorers of scenes as sources of models that a config can name."""

from dataclasses import dataclass

from segalign.formats.clip_scorer import ClipScorer, ImageSettings, Scorer
from segalign.scenes.base import load_scorer
from segalign.scenes.held_out import load_held_out
from segalign.scenes.world import get_world
from segalign.text.tokenizer import clip_tokenizer


@dataclass(frozen=True, kw_only=True)
class ScenesScorer:
    """The benchmark's scorer, a CLIP model of 3.9 M parameters.

    Args:
        world: World of the images; the shipped weights are of ``3x3``.
        weights: ``shipped``; ``preference``, shipped too, which configs/scenes/preference.yaml has
            trained from it; ``random``; or a run (or checkpoint) that trained one.
    """

    world: str = "3x3"
    weights: str = "shipped"

    def load(self) -> Scorer:
        """Build the scorer and read its weights.

        Raises:
            ConfigError: If the world or the run does not exist.
            DataError: If weights are missing or of another network.
        """
        side = get_world(self.world).image_size
        settings = ImageSettings(image_size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        return ClipScorer(load_scorer(self.world, self.weights), clip_tokenizer(), settings)


@dataclass(frozen=True, kw_only=True)
class HeldOutScorer:
    """A second scorer, a ResNet with a text tower of ``open_clip``, of 2.9 M parameters.

    It watches what is trained against the first: of another architecture and seed, and trained on
    noisy and on generated images too.

    Args:
        world: World of the images; the shipped weights are of ``3x3``.
        weights: ``shipped``, ``random``, or a run (or checkpoint) that trained one.
    """

    world: str = "3x3"
    weights: str = "shipped"

    def load(self) -> Scorer:
        """Build the scorer and read its weights.

        Raises:
            ConfigError: If the world or the run does not exist.
            DataError: If weights are missing or of another network.
        """
        return load_held_out(self.world, self.weights)
