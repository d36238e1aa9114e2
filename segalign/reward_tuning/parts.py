"""A batch cut into what is sampled at a time.

Dims: B batch, n samples of a part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.text.conditioning import TextConditioning
from segalign.truncation.engine import row_ranges


@dataclass(frozen=True, eq=False)
class PartOfBatch:
    """The samples of a batch that are sampled at a time.

    Attributes:
        text: Their conditioning, ``n`` captions.
        negative: That of the negative prompt, ``n`` rows; None without guidance.
        sample_ids: ``n`` ids.
        rows: Where they stand in the batch, int64 ``(n,)``.
        weights: Factors of their losses, ``(n,)``.
    """

    text: TextConditioning
    negative: TextConditioning | None
    sample_ids: Sequence[int]
    rows: Tensor
    weights: Tensor


def cut_batch(
    sample_ids: Sequence[int],
    text: TextConditioning,
    negative: TextConditioning | None,
    weights: Tensor,
    size: int | None,
) -> list[PartOfBatch]:
    """Cut a batch, without waiting for the device.

    Args:
        sample_ids: ``B`` ids.
        text: Conditioning of the captions.
        negative: That of the negative prompt, one row, which no part copies; None without guidance.
        weights: Factors of the losses, ``(B,)``.
        size: Samples of a part at most; None is all.
    """
    parts = []
    for rows in row_ranges(len(sample_ids), size):
        chosen = torch.arange(rows.start, rows.stop, device=weights.device)
        parts.append(
            PartOfBatch(
                text=text.select(chosen),
                negative=None if negative is None else negative.expand(len(rows)),
                sample_ids=sample_ids[rows.start : rows.stop],
                rows=chosen,
                weights=weights[chosen],
            )
        )
    return parts
