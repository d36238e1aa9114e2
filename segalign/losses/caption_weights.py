"""Weights that make every caption count alike, however many pairs of images it has.

Dims: B pairs of this rank.

Reference: PickScore (arXiv 2305.01569), whose loss weighs a pair by one over the number of its
caption's pairs in the data.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segalign.errors import DataError
from segalign.losses.contrastive import text_keys
from segalign.losses.gathering import gather_rows, gather_sizes
from segalign.ranks import own_rank


def pair_weights(captions: Sequence[str], num_pairs: Sequence[Any], valid: Tensor) -> Tensor:
    """Weigh the pairs of a batch, over all ranks.

    Args:
        captions: Caption of each pair.
        num_pairs: Number of pairs that each caption has in the data; where it is not known, those
            of the batch are counted.
        valid: Pairs that count, bool ``(B,)``.

    Returns:
        Weights ``(B,)``: one over the number, scaled to a mean of 1 over the valid pairs of all
        ranks.

    Raises:
        DataError: If a number is not at least 1.
    """
    for count, is_valid in zip(num_pairs, valid.tolist(), strict=True):
        if (
            is_valid
            and count is not None
            and not (isinstance(count, int | float) and 1 <= count < float("inf"))
        ):
            raise DataError(
                f"expected `num_pairs` of a caption to be a number of at least 1; got {count!r}; "
                "correct the metadata, or set `weigh_captions: false`"
            )
    (sizes,) = gather_sizes([len(captions)], valid.device)
    keys = gather_rows(text_keys(captions, valid.device), sizes)
    known = torch.tensor([_known(count) for count in num_pairs], device=valid.device)
    known = gather_rows(known, sizes)
    joined_valid = gather_rows(valid.long(), sizes).bool()
    _, caption = torch.unique(keys, return_inverse=True)
    in_batch = torch.bincount(caption[joined_valid], minlength=len(keys))[caption]
    weights = 1 / torch.where(known > 0, known, in_batch.clamp(min=1)).double()
    weights = weights * joined_valid.sum() / weights[joined_valid].sum().clamp(min=1e-12)
    first = sum(sizes[: own_rank()])
    own: Tensor = weights[first : first + len(captions)].float()
    return own


def _known(count: Any) -> float:
    """Return a number of pairs, 0 where it is not known."""
    return float(count) if isinstance(count, int | float) else 0.0
