"""Encode many rows in chunks whose activations are recomputed in the backward pass.

In-batch contrast needs the features of all rows at once, but not their activations: with chunks,
one chunk's activations are in memory at a time, for one more forward pass. The gradient is the
same, so this does what gradient caching does (arXiv 2101.06983).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Rows = TypeVar("Rows", Tensor, Sequence[str])


def encode_in_chunks(
    encode: Callable[[Rows], Tensor], rows: Rows, chunk_size: int | None
) -> Tensor:
    """Encode rows, a few at a time.

    Args:
        encode: Maps rows to features, each row alone; carries gradient.
        rows: All rows.
        chunk_size: Rows of a chunk; None encodes all at once and keeps the activations.

    Returns:
        Their features, ``(len(rows), ...)``.
    """
    if chunk_size is None or len(rows) <= chunk_size:
        return encode(rows)
    starts = range(0, len(rows), chunk_size)
    parts = [
        checkpoint(encode, rows[start : start + chunk_size], use_reentrant=False)
        for start in starts
    ]
    return torch.cat(parts)
