"""Features of a CLIP-type reward, computed once for all metrics, and brought together on the host.

Dims: B images of a micro-batch, N images or captions, E joint-embedding width, H/W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import EvaluationSetting
from segalign.metrics.host_gather import gather_to_host
from segalign.modes import evaluation_mode
from segalign.ranks import world_size
from segalign.rewards.batch_directions import BatchDirection, EmaDirection
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.protocol import Reward, RewardSource, without_chance


def load_reward(source: RewardSource | Reward, setting: EvaluationSetting) -> Reward:
    """Read a reward once for all metrics, and move it to where the images are.

    Args:
        source: Settings, or a reward that has been read.
        setting: The evaluation.

    Raises:
        ConfigError: If it cannot be read, or its scores depend on what an image is batched with.
        DataError: If weights are damaged or foreign.
    """
    given: Any = source
    reward: Reward = setting.pool.load(given) if callable(getattr(given, "load", None)) else given
    if isinstance(reward, nn.Module):
        _refuse_batches(reward)
        weights = [*reward.parameters(), *reward.buffers()]
        # A move empties caches, so it is made where it is one.
        if any(weight.device != setting.device for weight in weights):
            reward.to(setting.device)
    return reward


class ImageFeatures:
    """The image tower of a reward as a function of pixels: see `ImageBatch.once`.

    Args:
        reward: The reward.
    """

    def __init__(self, reward: ClipReward) -> None:
        self.reward = reward

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode uint8 ``(B, 3, H, W)`` to unit vectors ``(B, E)``, without gradient and chance."""
        reward = self.reward
        with (
            torch.no_grad(),
            torch.autocast(pixels.device.type, enabled=False),
            evaluation_mode(reward),
            without_chance(reward),
        ):
            reward.freeze()
            return reward.scorer.image_features(pixels.float() / 255)


def shared_features(reward: ClipReward, setting: EvaluationSetting) -> ImageFeatures:
    """Return the function that all metrics of an evaluation share for one reward."""
    shared: ImageFeatures = setting.pool.load(_FeaturesOf(reward))
    return shared


class FeatureRows:
    """Rows of features by a whole number, on this rank; a number that comes again is dropped."""

    def __init__(self) -> None:
        self._numbers: dict[int, None] = {}
        self._rows: list[Tensor] = []

    def add(self, numbers: Sequence[int], features: Tensor) -> None:
        """Add rows of features ``(N, E)``, as float32 on the CPU."""
        kept = [
            row
            for row, number in enumerate(numbers)
            if number not in self._numbers and number not in numbers[:row]
        ]
        self._numbers |= dict.fromkeys(numbers[row] for row in kept)
        if kept:
            self._rows.append(features.detach()[kept].float().cpu())

    def gather(self) -> tuple[Tensor, Tensor]:
        """Join the ranks, which all must call this.

        Returns:
            The numbers in ascending order, int64 ``(N,)``, and their features ``(N, E)``.
        """
        rows = torch.cat(self._rows) if self._rows else torch.zeros(0, 0)
        own = torch.tensor([*self._numbers], dtype=torch.int64)
        numbers, order = torch.sort(_gather(own), stable=True)
        features = _gather(rows)[order]
        is_first = torch.ones(len(numbers), dtype=torch.bool)
        is_first[1:] = numbers[1:] != numbers[:-1]
        return numbers[is_first], features[is_first]


class _FeaturesOf:
    """Makes a reward's `ImageFeatures`, one for a pool."""

    def __init__(self, reward: ClipReward) -> None:
        # A pool tells sources apart by how their attributes are shown.
        self._reward = _ById(reward)

    def load(self) -> ImageFeatures:
        return ImageFeatures(self._reward.reward)


class _ById:
    def __init__(self, reward: ClipReward) -> None:
        self.reward = reward

    def __repr__(self) -> str:
        return f"<reward {id(self.reward)}>"


def _gather(rows: Tensor) -> Tensor:
    if world_size() == 1:
        return rows
    # A rank without rows does not know how wide they are.
    return torch.cat([part for part in gather_to_host(rows) if len(part)] or [rows])


def _refuse_batches(reward: nn.Module) -> None:
    for part in reward.modules():
        if isinstance(part, BatchDirection) or (
            isinstance(part, EmaDirection) and not len(part.mean)
        ):
            raise ConfigError(
                "expected rewards that score each image by itself for an evaluation; got a common "
                "direction estimated from each batch, which differs with the number of ranks; name "
                "a file as `common_direction`, or leave it out"
            )
