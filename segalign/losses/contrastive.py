"""In-batch contrast of images with captions, whole or by segment, over all ranks.

Dims: B captions of this rank, N texts, M images, E joint-embedding width; N and M are those of this
rank, or of all ranks where it is said. A caption has one text (whole, or the mean of its segments)
or several (its segments), and one image or a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn import functional as F

from segalign.losses.gathering import gather_rows, gather_sizes
from segalign.ranks import own_rank


@dataclass(frozen=True, eq=False)
class OwnedFeatures:
    """Unit vectors, and the captions that they belong to.

    Attributes:
        features: ``(N, E)``. Carries gradient.
        owner: Caption of each, int64 ``(N,)``.
    """

    features: Tensor
    owner: Tensor

    def gather(self, counts: list[int], captions: list[int]) -> "OwnedFeatures":
        """Join those of all ranks; captions are numbered through.

        Args:
            counts: Number of features of each rank.
            captions: Number of captions of each rank.
        """
        firsts = torch.tensor([sum(captions[:rank]) for rank in range(len(captions))])
        shifts = firsts.repeat_interleave(torch.tensor(counts)).to(self.owner.device)
        owner = gather_rows(self.owner, counts) + shifts
        return OwnedFeatures(gather_rows(self.features, counts), owner)


def text_keys(texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Give equal texts equal numbers, the same on every rank: int64 ``(N,)``."""
    digests = [blake2b(text.encode(errors="replace"), digest_size=8).digest() for text in texts]
    numbers = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def contrastive_losses(
    texts: OwnedFeatures,
    keys: Tensor,
    images: OwnedFeatures,
    image_probs: Tensor,
    valid: Tensor,
    logit_scale: Tensor,
) -> Tensor:
    """Set every text against the images of other captions, and every image against their texts.

    With s the scaled inner products, for a text n and an image j of one caption, whose images are
    weighed by p (1 for a single image):

        l_nj = p_j / 2 (log(1 + sum_k exp(s_nk - s_nj)) + log(1 + sum_m exp(s_mj - s_nj)))

    over all images k of captions that do not hold the text n, and all texts m that the caption of j
    does not hold: the InfoNCE loss without false negatives, since short segments repeat. The other
    image of a pair is no negative either: most segments hold there too, and comparing the two is
    what pairwise losses do. The loss of a caption is the mean over its texts of ``sum_j l_nj``.

    Args:
        texts: This rank's texts; every caption has at least one.
        keys: Number of each text, equal for equal texts: see ``text_keys``, ``(N,)``.
        images: This rank's images.
        image_probs: p, ``(M,)``; those of a caption sum to 1.
        valid: Captions that count, bool ``(B,)``; others are neither asked nor negatives.
        logit_scale: Log of the inverse temperature, ``(1,)``. Carries gradient.

    Returns:
        Losses ``(B,)``, 0 for an invalid caption. Negatives come from all ranks, with gradients,
        so that ranks together compute the gradient of the joined batch.
    """
    joined = _JoinedBatch.gather(texts, keys, images, valid)
    first, scale = sum(joined.captions[: own_rank()]), logit_scale.exp()
    own = (texts.owner[:, None] == images.owner).nonzero(as_tuple=True)
    scores = scale * (texts.features[own[0]] * images.features[own[1]]).sum(dim=-1)

    to_images = scale * texts.features @ joined.images.features.T
    foreign = joined.foreign_images(keys)
    image_rivals = _hide(to_images, foreign).logsumexp(dim=1)
    to_texts = scale * images.features @ joined.texts.features.T
    foreign = joined.foreign_texts(first + images.owner)
    text_rivals = _hide(to_texts, foreign).logsumexp(dim=1)

    losses = F.softplus(image_rivals[own[0]] - scores) + F.softplus(text_rivals[own[1]] - scores)
    losses = image_probs[own[1]].to(losses) * losses / 2
    totals = losses.new_zeros(len(valid)).index_add(0, texts.owner[own[0]], losses)
    num_texts = torch.bincount(texts.owner, minlength=len(valid)).clamp(min=1)
    return torch.where(valid, totals / num_texts, 0)


@dataclass(frozen=True, eq=False)
class _JoinedBatch:
    """Texts and images of all ranks, and which caption holds which text."""

    captions: list[int]
    texts: OwnedFeatures
    images: OwnedFeatures
    valid: Tensor
    distinct: Tensor
    text: Tensor
    holds: Tensor

    @classmethod
    def gather(
        cls, texts: OwnedFeatures, keys: Tensor, images: OwnedFeatures, valid: Tensor
    ) -> "_JoinedBatch":
        sizes = (len(valid), len(texts.owner), len(images.owner))
        captions, text_counts, image_counts = gather_sizes(sizes, valid.device)
        joined_texts = texts.gather(text_counts, captions)
        distinct, text = torch.unique(gather_rows(keys, text_counts), return_inverse=True)
        holds = torch.zeros(len(distinct), sum(captions), dtype=torch.bool, device=keys.device)
        holds[text, joined_texts.owner] = True
        return cls(
            captions,
            joined_texts,
            images.gather(image_counts, captions),
            gather_rows(valid.long(), captions).bool(),
            distinct,
            text,
            holds,
        )

    def foreign_images(self, keys: Tensor) -> Tensor:
        """Tell which images are those of valid captions without a text: ``(N, all images)``."""
        text = torch.searchsorted(self.distinct, keys)
        return (~self.holds[text] & self.valid)[:, self.images.owner]

    def foreign_texts(self, captions: Tensor) -> Tensor:
        """Tell which texts of valid captions another caption does not hold: ``(M, all texts)``."""
        return ~self.holds[self.text][:, captions].T & self.valid[self.texts.owner]


def _hide(scores: Tensor, shown: Tensor) -> Tensor:
    """Push scores that do not take part below all others; finite, so that gradients are."""
    return scores.masked_fill(~shown, torch.finfo(scores.dtype).min / 4)
