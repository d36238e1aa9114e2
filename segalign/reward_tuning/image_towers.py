"""The parts of rewards that see images."""

from collections.abc import Callable

from torch import Tensor

from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.mixture import RewardMixture
from segalign.rewards.protocol import Reward


def image_towers(reward: Reward) -> list[Callable[[Tensor], Tensor]]:
    """List what a reward makes of images before it looks at texts, to count its work.

    Args:
        reward: Any reward; of those that are no CLIP models nothing is known.

    Returns:
        Functions of images in [0, 1], ``(B, 3, H, W)``.
    """
    if isinstance(reward, RewardMixture):
        return [tower for part in reward.rewards.values() for tower in image_towers(part)]
    return [reward.scorer.image_features] if isinstance(reward, ClipReward) else []
