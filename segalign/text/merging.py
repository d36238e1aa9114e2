"""Merge the kept tokens of a batch's segments into sequences of one length.

Only integers are worked out here; the features are gathered with one indexing per batch.

Dims: B captions, L token budget, D text width, E width of pooled features.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from segalign.errors import ConfigError
from segalign.text.caption_plan import SegmentTokens
from segalign.text.clip_tower import TokenFeatures

Pooling = Literal["mean", "first"]


def gather_tokens(
    captions: Sequence[Sequence[SegmentTokens]],
    features: TokenFeatures,
    padding: Tensor,
    token_budget: int,
) -> tuple[Tensor, Tensor]:
    """Build the merged sequences.

    Args:
        captions: Fitted segments of B captions.
        features: Features of the distinct sequences.
        padding: Vector of positions without a token, ``(D,)``.
        token_budget: L.

    Returns:
        ``prompt_embeds (B, L, D)`` and ``attention_mask (B, L)``, True at tokens.
    """
    pad_row = len(features.rows)
    token_rows = np.full((len(captions), token_budget), pad_row, dtype=np.int64)
    for caption_rows, segments in zip(token_rows, captions, strict=True):
        if not segments:
            continue
        rows = np.concatenate([features.first_rows[s.input_ids] + s.positions for s in segments])
        caption_rows[: len(rows)] = rows
    device = features.rows.device
    index = torch.from_numpy(token_rows).to(device, non_blocking=True)
    table = torch.cat([features.rows, padding.unsqueeze(0).to(features.rows.dtype)])
    return table[index], index != pad_row


def pool_segments(
    captions: Sequence[Sequence[SegmentTokens]],
    features: TokenFeatures,
    pooling: Pooling = "mean",
) -> Tensor:
    """Reduce the pooled end-token states of each caption's segments to one vector.

    Args:
        captions: Fitted segments of B captions, at least one each.
        features: Features of the distinct sequences.
        pooling: The ``mean`` over the segments, or the state of the ``first``.

    Returns:
        Vectors ``(B, E)``.
    """
    states = features.pooled
    if pooling == "first":
        first = [features.pooled_rows[segments[0].input_ids] for segments in captions]
        return states[torch.tensor(first, device=states.device)]
    num_segments = np.array([len(segments) for segments in captions])
    end_rows = np.zeros((len(captions), num_segments.max()), dtype=np.int64)
    for caption_rows, segments in zip(end_rows, captions, strict=True):
        caption_rows[: len(segments)] = [features.pooled_rows[s.input_ids] for s in segments]
    weights = (np.arange(num_segments.max()) < num_segments[:, None]) / num_segments[:, None]
    index = torch.from_numpy(end_rows).to(states.device, non_blocking=True)
    weight = torch.from_numpy(weights).to(states.device, states.dtype, non_blocking=True)
    return (states[index] * weight.unsqueeze(-1)).sum(dim=1)


def check_pooling(pooling: Pooling) -> Pooling:
    """Return the choice.

    Raises:
        ConfigError: If it is none.
    """
    if pooling not in get_args(Pooling):
        known = ", ".join(f"`{choice}`" for choice in get_args(Pooling))
        raise ConfigError(f"`pooled` must be one of {known}; got {pooling!r}")
    return pooling
