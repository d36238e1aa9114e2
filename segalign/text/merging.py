"""Merge the kept tokens of a batch's segments into sequences of one length.

Only integers are worked out here; the features are gathered with one indexing per batch.

Dims: B captions, L token budget, M largest number of segments in a caption.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from segalign.text.caption_plan import SegmentTokens
from segalign.text.clip_tower import TokenFeatures


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


def mean_end_state(
    captions: Sequence[Sequence[SegmentTokens]],
    features: TokenFeatures,
) -> Tensor:
    """Average the end-token states of each caption's segments.

    Args:
        captions: Fitted segments of B captions, at least one each.
        features: Features of the distinct sequences.

    Returns:
        Means ``(B, D)``.
    """
    num_segments = np.array([len(segments) for segments in captions])
    end_rows = np.zeros((len(captions), num_segments.max()), dtype=np.int64)
    for caption_rows, segments in zip(end_rows, captions, strict=True):
        caption_rows[: len(segments)] = [
            features.first_rows[s.input_ids] + len(s.input_ids) - 1 for s in segments
        ]
    weights = (np.arange(num_segments.max()) < num_segments[:, None]) / num_segments[:, None]
    rows = features.rows
    index = torch.from_numpy(end_rows).to(rows.device, non_blocking=True)
    weight = torch.from_numpy(weights).to(rows.device, rows.dtype, non_blocking=True)
    return (rows[index] * weight.unsqueeze(-1)).sum(dim=1)
