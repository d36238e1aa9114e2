"""Losses on pairs of images that were preferred one to the other, one value per sample.

Dims: B pairs, N segments in the batch. A pair's images are numbered 0 and 1.

References: PickScore (arXiv 2305.01569); segment-level losses are our reading of arXiv 2410.11817,
whose own equations are not published.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pairwise_loss(logits: Tensor, preference_probs: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the preferences from the model's, ``KL(p || softmax(s))``.

    For a clear preference this is ``-log sigmoid(s_w - s_l)``; for a tie it is zero where both
    images score alike, as PickScore's correction by ``log 1/2`` makes it.

    Args:
        logits: Scaled scores of both images, ``(B, 2)``. Carries gradient.
        preference_probs: Probability that each image is the preferred one, ``(B, 2)``; a row sums
            to 1, and a tie is (0.5, 0.5). No gradient.

    Returns:
        Losses ``(B,)``, at least 0.
    """
    return F.kl_div(F.log_softmax(logits, dim=-1), preference_probs, reduction="none").sum(dim=-1)


def segment_pairwise_loss(
    segment_logits: Tensor, segment_owner: Tensor, preference_probs: Tensor
) -> Tensor:
    """`pairwise_loss` of every segment with its pair's preference, averaged over a caption.

    Args:
        segment_logits: Scaled scores of both images against each segment, ``(N, 2)``. Carries
            gradient.
        segment_owner: Pair that each segment belongs to, int64 ``(N,)``, in [0, B).
        preference_probs: See `pairwise_loss`, ``(B, 2)``.

    Returns:
        Losses ``(B,)``; 0 for a pair without segments.
    """
    losses = pairwise_loss(segment_logits, preference_probs[segment_owner])
    return _mean_by_owner(losses, segment_owner, len(preference_probs))


def pairwise_margin_loss(scores: Tensor, preference_probs: Tensor, margin: float) -> Tensor:
    """Hinge on the difference of a pair's scores, as far as the preference is clear.

    Args:
        scores: Scores of both images, ``(B, 2)``. Carries gradient.
        preference_probs: See `pairwise_loss`. A pair's loss is weighed by ``|p_0 - p_1|``, so ties
            do not count.
        margin: Wanted difference, in units of the scores.

    Returns:
        Losses ``(B,)``: ``|p_0 - p_1| max(0, margin - (s_w - s_l))``.
    """
    clear = preference_probs[:, 0] - preference_probs[:, 1]
    difference = (scores[:, 0] - scores[:, 1]) * clear.sign()
    return clear.abs() * F.relu(margin - difference)


def segment_pairwise_margin_loss(
    segment_scores: Tensor, segment_owner: Tensor, preference_probs: Tensor, margin: float
) -> Tensor:
    """`pairwise_margin_loss` of every segment with its pair's preference, averaged over a caption.

    Args:
        segment_scores: Scores of both images against each segment, ``(N, 2)``. Carries gradient.
        segment_owner: See `segment_pairwise_loss`.
        preference_probs: See `pairwise_loss`, ``(B, 2)``.
        margin: Wanted difference, in units of the scores.

    Returns:
        Losses ``(B,)``; 0 for a pair without segments.
    """
    losses = pairwise_margin_loss(segment_scores, preference_probs[segment_owner], margin)
    return _mean_by_owner(losses, segment_owner, len(preference_probs))


def _mean_by_owner(values: Tensor, owner: Tensor, num_owners: int) -> Tensor:
    """Average values ``(N,)`` by owner, ``(num_owners,)``; 0 for an owner without any."""
    sums = values.new_zeros(num_owners).index_add(0, owner, values)
    return sums / torch.bincount(owner, minlength=num_owners).clamp(min=1)
