"""Distances between features of the stages of a network, as LPIPS has them.

Dims: B images, C channels of a stage, h/w places of a stage, H/W pixels.

Reference: arXiv 1801.03924.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from segalign.metrics.extractors.frozen import FrozenNetwork

_EPSILON: Final = 1e-8


class StageNet(FrozenNetwork[list[Tensor]]):
    """A network whose stages are compared: a ``PerceptualNet``.

    Args:
        stages: Run one after the other.
        heads: Weight of each channel of each stage, float32 ``(C,)``.
        prepare: Maps pixels, uint8 ``(B, 3, H, W)``, to the first stage's input.
        details: What distances depend on, plain data.
    """

    def __init__(
        self,
        stages: nn.Sequential,
        heads: Sequence[Tensor],
        prepare: Callable[[Tensor], Tensor],
        details: Mapping[str, Any],
    ) -> None:
        super().__init__(stages, details)
        self._stages = stages
        self._heads = list(heads)
        self._prepare = prepare

    @override
    def look(self, pixels: Tensor) -> list[Tensor]:
        """Return each stage's features ``(B, C, h, w)``, of unit length at every place."""
        states, seen = self._prepare(pixels), []
        for stage in self._stages:
            states = stage(states)
            seen.append(unit_channels(states))
        return seen

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Compute d = sum over stages of the mean over places of sum_c w_c (f_c - g_c)^2.

        Args:
            first: Features of B images by stage.
            second: Those of the images that they are compared with, row by row.

        Returns:
            float64 ``(B,)``, on the network's device.
        """
        total = torch.zeros(len(first[0]), dtype=torch.float64, device=self.device)
        for head, one, other in zip(self._heads, first, second, strict=True):
            weights = head.to(self.device).view(-1, 1, 1)
            places = ((one - other).square() * weights).sum(dim=1)
            total += places.mean(dim=(1, 2)).double()
        return total


def unit_channels(states: Tensor) -> Tensor:
    """Scale the channels at each place to length 1: f / sqrt(1e-8 + sum_c f_c^2)."""
    return states / (states.square().sum(dim=1, keepdim=True) + _EPSILON).sqrt()
