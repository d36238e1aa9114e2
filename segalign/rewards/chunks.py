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


def encode_texts(
    encode: Callable[[Sequence[str]], Tensor], texts: Sequence[str], *, chunk_size: int | None
) -> Tensor:
    """Encode texts, equal ones once, those of similar length in one chunk.

    Args:
        encode: Maps texts to features; carries gradient.
        texts: ``N`` texts.
        chunk_size: See ``encode_in_chunks``, in distinct texts.

    Returns:
        Their features, ``(N, ...)``.
    """
    if chunk_size is None:
        return encode(texts)
    distinct = sorted(dict.fromkeys(texts), key=len)
    features = encode_in_chunks(encode, distinct, chunk_size)
    places = {text: place for place, text in enumerate(distinct)}
    return features[torch.tensor([places[text] for text in texts], device=features.device)]
