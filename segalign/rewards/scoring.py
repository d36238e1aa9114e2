"""Scores of finished images by several rewards, for evaluation.

Dims: B images, H/W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from segalign.rewards.bound_reward import bind_reward
from segalign.rewards.protocol import Reward, check_batch, without_chance


@torch.no_grad()
def score_images(
    rewards: Mapping[str, Reward],
    images: Tensor,
    captions: Sequence[str],
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """Score images against their captions, without chance: random crops are of the centre.

    Args:
        rewards: The rewards by name. Estimates that learn in training mode must be in evaluation
            mode; all ranks must call this, where one follows the batches.
        images: Float in [0, 1], ``(B, 3, H, W)``. Rewards of an image that is not finite are NaN;
            it changes no other's.
        captions: ``B`` captions.
        valid: Which rows are no padding, bool ``(B,)``: an estimate of the common direction that
            follows the batches sees those alone. None is all.

    Returns:
        ``(B,)`` each, without gradient: ``NAME``, and ``NAME/PART`` for what it is made of.

    Raises:
        DataError: If images and captions do not fit, or images are not in [0, 1].
    """
    finite = finite_images(images)
    seen = torch.where(finite.view(-1, 1, 1, 1), images, 0)
    check_batch(seen, captions)
    rows = torch.arange(len(seen), device=seen.device)
    scores: dict[str, Tensor] = {}
    for name, reward in rewards.items():
        with without_chance(reward):
            bound = bind_reward(reward, captions, name=name, is_rewarded=False, counted=valid)
            terms = bound(seen, rows)
        found = {name: terms.rewards} | {f"{name}/{part}": v for part, v in terms.parts.items()}
        scores |= {key: torch.where(finite, values, torch.nan) for key, values in found.items()}
    return scores


def finite_images(images: Tensor) -> Tensor:
    """Tell which images are finite in all pixels, bool ``(B,)``."""
    return images.flatten(1).isfinite().all(dim=1)
