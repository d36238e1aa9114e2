"""Scores of finished images by several rewards, for evaluation.

Dims: B images, H/W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from segalign.rewards.bound_reward import bind_reward
from segalign.rewards.protocol import Reward, check_batch


@torch.no_grad()
def score_images(
    rewards: Mapping[str, Reward], images: Tensor, captions: Sequence[str]
) -> dict[str, Tensor]:
    """Score images against their captions.

    Args:
        rewards: The rewards by name. Estimates that learn in training mode must be in evaluation
            mode; all ranks must call this, where one follows the batches.
        images: Float in [0, 1], ``(B, 3, H, W)``.
        captions: ``B`` captions.

    Returns:
        ``(B,)`` each, without gradient: ``NAME``, and ``NAME/PART`` for what it is made of.

    Raises:
        DataError: If images and captions do not fit, or images are not in [0, 1].
        NonFiniteError: If an image is not finite.
    """
    check_batch(images, captions)
    rows = torch.arange(len(images), device=images.device)
    scores = {}
    for name, reward in rewards.items():
        terms = bind_reward(reward, captions, name=name, is_rewarded=False)(images, rows)
        scores[name] = terms.rewards
        scores |= {f"{name}/{part}": values for part, values in terms.parts.items()}
    return scores
