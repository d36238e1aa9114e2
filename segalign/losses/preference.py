"""Losses of CLIP-type preference models, one value per sample; the caller reduces.

Dims: B batch, N texts, Q questions, K answers, E joint-embedding width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_segment_loss(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every question that an image answers, each answer being a segment.

    Args:
        logits: Scaled similarities of image and answer, ``(B, Q, K)``; -inf where a question has
            fewer than K answers. Carries gradient.
        answers: Index of the right answer, int64 ``(B, Q)``; -1 where the image gives none.

    Returns:
        Losses ``(B,)``, the mean over a sample's questions (0 if it has none), and whether each
        question was answered right, bool ``(B, Q)``, False where there was none.
    """
    asked = answers >= 0
    losses = F.cross_entropy(
        logits.flatten(0, 1), answers.flatten(), ignore_index=-1, reduction="none"
    )
    per_sample = losses.view_as(answers).sum(1) / asked.sum(1).clamp(min=1)
    return per_sample, asked & (logits.argmax(-1) == answers)


def edit_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    negative_features: Tensor,
    logit_scale: Tensor,
) -> Tensor:
    """In-batch contrast of images with captions, and with edits of their own caption.

    Args:
        image_features: Unit vectors ``(B, E)``; carries gradient.
        text_features: Unit vectors of the captions ``(B, E)``; carries gradient.
        negative_features: Unit vectors of M edited captions of each image, ``(B, M, E)``.
        logit_scale: Log of the inverse temperature, ``(1,)``.

    Returns:
        Losses ``(B,)``: mean of image-to-caption, caption-to-image and image-to-own-edits
        cross-entropy.
    """
    scale = logit_scale.exp()
    logits = scale * image_features @ text_features.T
    own = torch.arange(len(logits), device=logits.device)
    edits = scale * torch.einsum("be,bme->bm", image_features, negative_features)
    against_edits = torch.cat([logits.diagonal()[:, None], edits], dim=1)
    return (
        F.cross_entropy(logits, own, reduction="none")
        + F.cross_entropy(logits.T, own, reduction="none")
        + F.cross_entropy(against_edits, torch.zeros_like(own), reduction="none")
    ) / 3
