"""Vision towers as feature extractors: what those of timm and of transformers share.

Dims: B images, d features, S side of the input.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.metrics.extractors.frozen import FrozenNetwork
from segalign.metrics.extractors.protocol import Features
from segalign.metrics.extractors.resizing import smooth_bicubic


class Tower(FrozenNetwork[Features]):
    """A vision tower, ready to look at images: a ``FeatureExtractor``.

    Images become squares of the tower's size, bicubic with antialiasing, nothing is cut off.

    Args:
        network: The tower.
        pool: Maps normalised images, ``(B, 3, S, S)``, to features ``(B, d)``.
        image_size: S.
        mean: Of each colour of images in [0, 1].
        std: Of each colour.
        unit: Scale features to length 1.
        details: What its numbers depend on besides, plain data, with ``library``.

    Raises:
        ConfigError: If the tower cannot take images of that size.
    """

    def __init__(
        self,
        network: nn.Module,
        pool: Callable[[Tensor], Tensor],
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        unit: bool,
        details: Mapping[str, Any],
    ) -> None:
        library = str(details["library"])
        super().__init__(
            network,
            {
                **details,
                "library": f"{library} {version(library)}",
                "resize": "bicubic, antialiased, squashed",
                "input_size": image_size,
                "mean": [float(value) for value in mean],
                "std": [float(value) for value in std],
                "unit": unit,
            },
        )
        self._pool = pool
        self._image_size = image_size
        self._mean, self._std = (
            torch.tensor(list(values), dtype=torch.float32).view(3, 1, 1) for values in (mean, std)
        )
        self._unit = unit
        self.num_features = self._try_out()

    @override
    def look(self, pixels: Tensor) -> Features:
        """Resize, normalise, and run the tower."""
        images = smooth_bicubic(pixels, self._image_size)
        mean, std = self._mean.to(self.device), self._std.to(self.device)
        features = self._pool((images - mean) / std).float()
        return Features(F.normalize(features, dim=-1) if self._unit else features, None)

    def _try_out(self) -> int:
        """Count the features of a black image."""
        side = self._image_size
        try:
            features = self(torch.zeros(1, 3, side, side, dtype=torch.uint8)).features
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise _unfit(side, reason) from error
        return features.shape[1]


def check_patches(side: int, patch: int | None) -> None:
    """Refuse a side that is no multiple of the patches; towers would cut off the rest.

    Raises:
        ConfigError: If it is none.
    """
    if patch and side % patch:
        raise _unfit(side, f"patches of {patch}")


def _unfit(side: int, reason: str) -> ConfigError:
    return ConfigError(
        f"expected an `image_size` that the tower can take; got {side} ({reason}); give a multiple "
        "of its patches, or the size that it was trained on"
    )
