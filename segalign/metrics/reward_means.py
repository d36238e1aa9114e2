"""Means of rewards over the images of an evaluation, for those who watch a run.

Dims: B images of a micro-batch, H/W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from typing_extensions import override

from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.metrics.fixed_directions import clip_rewards, fixed_direction, held_directions
from segalign.metrics.place_values import PlaceValues, means
from segalign.metrics.reward_protocol import reward_protocol
from segalign.rewards.protocol import Reward


class ScoreImages(Protocol):
    """Scores images, as modules that are tuned by a reward do."""

    def __call__(
        self, images: Tensor, captions: Sequence[str], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Score images in [0, 1], ``(B, 3, H, W)``, against their captions.

        Returns:
            ``(B,)`` each by name: ``reward``, its parts as ``reward/PART``, and rewards that are
            not trained on as ``held_out/NAME``; NaN where an image has none.
        """
        ...


class RewardMetric(ImageMetric):
    """Mean rewards of the images that count; scores that are not finite are left out.

    CLIP-type rewards whose common direction follows the batches of training are given a fixed one
    meanwhile: so scores of different steps can be compared, and depend on no other image.

    Args:
        score_images: Makes the scores.
        rewards: The rewards that it scores by, by name.
        prefix: Stands before every name, which a module may log its own validation under.
    """

    name = "rewards"

    def __init__(
        self, score_images: ScoreImages, rewards: Mapping[str, Reward], prefix: str = "monitor/"
    ) -> None:
        self.score_images = score_images
        self.rewards = rewards
        self.prefix = prefix
        self._described: dict[str, Any] | None = None

    @override
    def start(self, setting: EvaluationSetting) -> None:
        self._num_images = setting.plan.num_images
        self._found = PlaceValues()
        self._directions = {
            reward: fixed_direction(reward, setting)
            for reward in clip_rewards(self.rewards).values()
            if reward.common_direction is not None
        }

    @override
    def update(self, batch: ImageBatch) -> None:
        with held_directions(self._directions):
            scores = self.score_images(batch.images, batch.captions, batch.counted)
        named = {f"{self.prefix}{name}": values for name, values in scores.items()}
        self._found.add(batch.places, batch.counted, named)

    @override
    def finish(self) -> Findings:
        found = self._found.join(self._num_images)
        if self._described is None:
            with held_directions(self._directions):
                self._described = {n: reward_protocol(one) for n, one in self.rewards.items()}
        protocol = {"metric": self.name, "rewards": self._described}
        return Findings(means(found), protocol, per_image=found)
