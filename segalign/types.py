"""Batches that pass between the datamodule, the modules and the callbacks.

Dims: B batch, H and W pixels.
"""

from typing import Any, NotRequired, TypedDict

from torch import Tensor

from segalign.data.faults import FaultRecord


class CaptionBatch(TypedDict):
    """Captions, with or without their images.

    Attributes:
        sample_ids: Position of each sample in the manifest, int64 ``(B,)``.
        captions: ``B`` captions; an invalid row holds ``""``.
        valid: False for padding and for samples that could not be read, bool ``(B,)``.
        epochs: Epoch that each sample belongs to (a batch may straddle a border), int64 ``(B,)``.
        metadata: The other fields of each sample's JSON member, ``B`` dicts.
        images: Float in [0, 1], ``(B, 3, H, W)``; absent for caption-only data.
        faults: What was wrong with the rows that could not be read; the datamodule takes it out
            when the batch is consumed.
    """

    sample_ids: Tensor
    captions: list[str]
    valid: Tensor
    epochs: Tensor
    metadata: list[dict[str, Any]]
    images: NotRequired[Tensor]
    faults: NotRequired[list[FaultRecord]]


class PreferenceBatch(TypedDict):
    """Two images of one caption, and which of them people prefer.

    Attributes:
        sample_ids: Position of each sample in the manifest, int64 ``(B,)``.
        captions: ``B`` captions; an invalid row holds ``""``.
        valid: False for padding and for samples that could not be read, bool ``(B,)``.
        epochs: Epoch that each sample belongs to, int64 ``(B,)``.
        metadata: The other fields of each sample's JSON member, ``B`` dicts.
        image_pairs: Float in [0, 1], ``(B, 2, 3, H, W)``.
        preference_probs: Probability that each of the two is the preferred one, float ``(B, 2)``,
            rows sum to 1; a tie is ``(0.5, 0.5)``.
        faults: As in ``CaptionBatch``.
    """

    sample_ids: Tensor
    captions: list[str]
    valid: Tensor
    epochs: Tensor
    metadata: list[dict[str, Any]]
    image_pairs: Tensor
    preference_probs: Tensor
    faults: NotRequired[list[FaultRecord]]
