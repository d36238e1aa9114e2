"""What all networks that measure images have in common.

Dims: B images, H/W pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from segalign.metrics.extractors.protocol import exact_pass

T = TypeVar("T")


class FrozenNetwork(ABC, Generic[T]):
    """A network in evaluation mode and float32; a pass is exact and leaves no trace.

    It is no ``nn.Module``, so that no module that holds it has its weights.

    Args:
        network: The network, weights loaded.
        details: What its numbers depend on, plain data.
    """

    def __init__(self, network: nn.Module, details: Mapping[str, Any]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.device = torch.device("cpu")
        self._details = dict(details)

    def protocol(self) -> dict[str, Any]:
        """Say all that the numbers depend on besides the images, as plain data."""
        return {**self._details, "dtype": "float32"}

    def __call__(self, pixels: Tensor) -> T:
        """Look at images, uint8 ``(B, 3, H, W)``."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"expected uint8 pixels (B, 3, H, W); got {pixels.dtype} {tuple(pixels.shape)}"
            )
        self.network.eval()
        with exact_pass(self.device):
            return self.look(pixels.to(self.device))

    def to(self, device: torch.device) -> Self:
        """Move the network to ``device``."""
        self.device = torch.device(device)
        with torch.inference_mode(False):
            self.network.to(self.device)
        return self

    @abstractmethod
    def look(self, pixels: Tensor) -> T:
        """Run the network on uint8 ``(B, 3, H, W)``."""
