"""What a reward is."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """Scores images against their captions."""

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score each image against its own caption.

        Args:
            images: Float, in [0, 1], ``(B, 3, H, W)``. Carries gradient.
            captions: ``B`` captions.

        Returns:
            Rewards ``(B,)``, higher is better, unscaled; differentiable in the images.
        """
        ...
