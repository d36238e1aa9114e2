"""What a perceptual distance between images is.

Dims: B images, H/W pixels.
"""

from typing import Any, Protocol, Self

import torch
from torch import Tensor


class PerceptualNet(Protocol):
    """A frozen network; a pass draws no random numbers and leaves all flags as they were.

    Images are looked at once each; distances come from what was seen, so that all pairs of n images
    cost n passes.
    """

    def protocol(self) -> dict[str, Any]:
        """Say all that distances depend on besides the images: see ``FeatureExtractor``."""
        ...

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        """Look at images, uint8 ``(B, 3, H, W)``: features of each stage, ``(B, ...)``."""
        ...

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Compute distances of rows from their stage features, float64 ``(B,)``, 0 if equal."""
        ...

    def to(self, device: torch.device) -> Self:
        """Move the network to ``device``."""
        ...


class PerceptualSource(Protocol):
    """Settings of a distance, such as a config names them; making them reads nothing."""

    # Any: the parser of configs accepts a narrower type for nothing else.
    def load(self) -> Any:
        """Read the weights; returns a ``PerceptualNet``.

        Raises:
            ConfigError: If a setting cannot work.
            DataError: If the weights are missing, damaged or foreign.
        """
        ...
