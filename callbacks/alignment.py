"""How well generated images fit their captions, while training and after."""

from collections.abc import Sequence

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from segalign.errors import ConfigError
from segalign.evaluation.image_metric import ImageMetric
from segalign.metrics.alignment import Alignment
from segalign.metrics.generated_retrieval import GeneratedRetrieval
from segalign.rewards.protocol import RewardSource
from segalign.scenes.image_metric import SceneFacts as SceneFactsMetric
from segalign.scenes.world import get_world


class TextAlignment(ImageMetricCallback):
    """Log rewards of generated images, and whether images are found by their captions.

    ``val/reward/NAME`` of each reward, ``val/denscore/NAME`` and ``val/denscore_o/NAME`` of those
    that score segments. After ``test`` also by length of the caption and by place of the segment.

    Args:
        rewards: Rewards by name.
        common_directions: Files of ``main.py direction estimate`` by the reward's name, for
            Denscore-O; without one it is the reward's own, or that of the evaluated captions.
        retrieval: Name of the reward that ranks images by captions; null ranks none.
        gallery_size: Images of each gallery; null makes one of all.
    """

    def __init__(
        self,
        rewards: dict[str, RewardSource],
        common_directions: dict[str, str] | None = None,
        retrieval: str | None = None,
        gallery_size: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        if retrieval is not None and retrieval not in rewards:
            raise ConfigError(
                "expected `retrieval` to name one of the rewards "
                f"({', '.join(f'`{name}`' for name in rewards)}); got `{retrieval}`. Change it."
            )
        self.rewards = rewards
        self.common_directions = common_directions
        self.retrieval = retrieval
        self.gallery_size = gallery_size

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        metrics: list[ImageMetric] = [Alignment(self.rewards, self.common_directions)]
        if self.retrieval is not None:
            metrics.append(GeneratedRetrieval(self.rewards[self.retrieval], self.gallery_size))
        return metrics


class SceneFacts(ImageMetricCallback):
    """Log how many of the facts that captions of scenes state are shown, by the oracle.

    Args:
        world: World of the captions.
    """

    def __init__(self, world: str = "3x3") -> None:
        super().__init__()
        self.world = get_world(world)

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        return [SceneFactsMetric(self.world)]
