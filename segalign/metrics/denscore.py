"""Denscore and Denscore-O: a segment-scoring CLIP-type model's view of generated images.

With x the unit features of the image, ``t_1 .. t_n`` those of the caption's segments, ``C`` their
mean and V the common direction of captions:

- Denscore is ``100 mean_i <x, t_i> = 100 <x, C>``;
- Denscore-O is ``100 cos(x, C_perp) = 100 <x, C_perp> / |C_perp|`` with ``C_perp = C - <C, V> V``.

The factor 100 is that of CLIP scores. The paper's figures show plain products of 0.20 to 0.28 where
its tables have 20 to 24, so that this is its scale. The paper does not define Denscore-O; as it is
larger than Denscore, it cannot be the product with ``C_perp`` as it is. With the paper's own
numbers, products of 0.15 to 0.20 and common shares of averaged captions around 0.86, ``C_perp`` of
unit ``C`` is 0.51 long and the cosine 29 to 39, and 29 to 39 is what the paper's tables have.

Dims: N images, M captions, E joint-embedding width.

Reference: arXiv 2410.11817 (tables 2 and 3).
"""

from typing import Final

import torch
from torch import Tensor

from segalign.metrics.ranking import from_fixed_point, to_fixed_point
from segalign.rewards.decomposition import text_relevant, unit_mean

SCALE: Final = 100.0
FORMULAS: Final = {
    "denscore": "100 * mean_i <x, t_i>",
    "denscore_o": "100 * <x, c - <c, v> v> / |c - <c, v> v|, c = mean_i t_i",
}
# Below it, what is left of a caption is rounding.
_MIN_LENGTH: Final = 1e-4


def denscore_o(image_features: Tensor, text_features: Tensor, common_direction: Tensor) -> Tensor:
    """Return the Denscore-O of each image, in float64.

    Args:
        image_features: Unit vectors, ``(N, E)``.
        text_features: Mean unit features of the segments of each image's caption, ``(N, E)``.
        common_direction: V, unit vector ``(E,)``.

    Returns:
        ``(N,)``, in [-100, 100]; NaN where a caption is nothing but V.
    """
    relevant = text_relevant(text_features.double(), common_direction.double())
    length = relevant.norm(dim=-1)
    products = (image_features.double() * relevant).sum(dim=-1)
    return torch.where(length > _MIN_LENGTH, SCALE * products / length, torch.nan)


def mean_direction(text_features: Tensor) -> Tensor:
    """Estimate V from the captions of an evaluation: their normalised mean, float64 ``(E,)``.

    Features are rounded to 2^-26 and summed as whole numbers, so that order does not matter.

    Args:
        text_features: One row for each caption, no longer than 1, ``(M, E)``.

    Raises:
        DataError: If they are not finite, or cancel out.
    """
    points = to_fixed_point(text_features)
    return unit_mean(from_fixed_point(points.sum(dim=0)), len(points))
