"""Ranks of the right answers in a gallery of images and captions, exactly.

Dims: N samples of the gallery, U distinct captions among them, E joint-embedding width.
"""

from typing import Final

import torch
from torch import Tensor

from segalign.metrics.fixed_point import from_grid, to_grid

# Vectors of length 1 in this grain have inner products below 2^53, and so have all partial sums
# (Cauchy-Schwarz): whole numbers that float64 adds exactly, in any order.
_GRAIN_BITS: Final = 26
MAX_LENGTH: Final = 1.001
_BLOCK: Final = 512


def to_fixed_point(features: Tensor) -> Tensor:
    """Round features of length at most 1 to multiples of 2^-26, as whole numbers in float64.

    The rounding is that of float32 for values of 1/4. Inner products of the result are exact, so
    that equal features tie whatever kernel, block or machine multiplies them.

    Args:
        features: ``(..., E)``, rows no longer than ``MAX_LENGTH``.
    """
    return to_grid(features, _GRAIN_BITS)


def from_fixed_point(points: Tensor) -> Tensor:
    """Undo ``to_fixed_point``, but for its rounding."""
    return from_grid(points, _GRAIN_BITS)


def gallery_ranks(
    image_features: Tensor, text_features: Tensor, caption_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Rank the right answers of a gallery by inner product; 0 is the first place.

    Samples with equal captions are right answers to each other: a caption finds its image when
    any image with that caption comes first, and an image finds its caption among the distinct
    ones. A wrong answer that scores the same as the right one is placed before it.

    Args:
        image_features: Of each sample, in fixed point, ``(N, E)``.
        text_features: Of each sample's caption, in fixed point, ``(N, E)``; equal captions have
            equal features (the first one's count).
        caption_keys: Equal for equal captions only, int64 ``(N,)``.

    Returns:
        Wrong images placed before the best right one, for each caption, and wrong captions placed
        before the right one, for each image: int64 ``(N,)`` both.
    """
    distinct, owner = torch.unique(caption_keys, return_inverse=True)
    num_captions, num_samples = len(distinct), len(owner)
    rows = torch.arange(num_samples)
    first = torch.full((num_captions,), num_samples).scatter_reduce(0, owner, rows, "amin")
    texts = text_features[first]
    own_scores = (image_features * texts[owner]).sum(dim=-1)
    text_ranks = torch.zeros(num_captions, dtype=torch.int64)
    image_ranks = torch.zeros(num_samples, dtype=torch.int64)
    for numbers in torch.split(torch.arange(num_captions), _BLOCK):
        scores = texts[numbers] @ image_features.T
        is_right = owner == numbers.unsqueeze(-1)
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        text_ranks[numbers] = ((scores >= best) & ~is_right).sum(dim=1)
        image_ranks += ((scores >= own_scores) & ~is_right).sum(dim=0)
    return text_ranks[owner], image_ranks
