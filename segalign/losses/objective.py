"""The weighted sum of losses that a preference model is trained with.

Dims: B captions, N segments, M images (B, or 2B for pairs), E joint-embedding width.

References: PickScore (arXiv 2305.01569) for the pairwise loss; the segment-level losses are our
reading of arXiv 2410.11817, whose own equations are not published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from segalign.errors import ConfigError
from segalign.losses.contrastive import OwnedFeatures, contrastive_losses, text_keys
from segalign.losses.pairwise import (
    pairwise_loss,
    pairwise_margin_loss,
    segment_pairwise_loss,
    segment_pairwise_margin_loss,
)

_UNSCALED = ("margin", "segment_margin")
_PAIRED = ("pairwise", "segment_pairwise", *_UNSCALED)


@dataclass(frozen=True, eq=False, kw_only=True)
class PreferenceFeatures:
    """What the losses see of a batch.

    Attributes:
        segments: Unit vectors of the captions' segments; of whole captions, one each.
        segment_texts: The segments, ``N``.
        mean: Mean of each caption's segments, ``(B, E)``.
        captions: The captions.
        images: Unit vectors ``(M, E)``; a pair's two images follow each other.
        preference_probs: Probability that each image of a pair is the preferred one, ``(B, 2)``;
            None for single images.
        valid: Captions that count, bool ``(B,)``.
        pair_weights: Factors of the losses on pairs, ``(B,)``; None weighs all alike.
    """

    segments: OwnedFeatures
    segment_texts: list[str]
    mean: Tensor
    captions: list[str]
    images: Tensor
    preference_probs: Tensor | None
    valid: Tensor
    pair_weights: Tensor | None = None

    def image_probs(self) -> Tensor:
        """Return the weight of each image within its caption, ``(M,)``."""
        if self.preference_probs is None:
            return self.images.new_ones(len(self.images))
        return self.preference_probs.flatten()

    def owned_images(self) -> OwnedFeatures:
        """Return the images with their captions."""
        per_caption = len(self.images) // len(self.captions)
        captions = torch.arange(len(self.captions), device=self.images.device)
        return OwnedFeatures(self.images, captions.repeat_interleave(per_caption))

    def pair_scores(self) -> Tensor:
        """Score both images of each pair against the caption, unscaled: ``(B, 2)``."""
        return torch.einsum("be,bpe->bp", self.mean, self._pairs())

    def segment_pair_scores(self) -> Tensor:
        """Score both images of each segment's pair against the segment, unscaled: ``(N, 2)``."""
        pairs = self._pairs()[self.segments.owner]
        return torch.einsum("ne,npe->np", self.segments.features, pairs)

    def _pairs(self) -> Tensor:
        return self.images.reshape(-1, 2, self.images.shape[-1])


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective:
    """Weights of the losses; at least one is positive.

    Args:
        pairwise: Of PickScore's loss on the caption's score, which is the mean of its segments'.
        segment_pairwise: Of the same on every segment's score, averaged over a caption.
        margin: Of the hinge on the difference of the captions' scores.
        segment_margin: Of the same on every segment's scores, averaged over a caption.
        contrastive: Of the in-batch contrast of images with captions, by the captions' scores.
        segment_contrastive: Of the in-batch contrast of images with every segment.
        margin_width: Difference that the hinges ask for, in units of cosine similarity.
    """

    pairwise: float = 0.0
    segment_pairwise: float = 0.0
    margin: float = 0.0
    segment_margin: float = 0.0
    contrastive: float = 0.0
    segment_contrastive: float = 0.0
    margin_width: float = 0.05

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(
                    f"expected `objective.{name}` of at least 0; got {weight}; change it"
                )
        if not self.weights():
            known = ", ".join(field.name for field in fields(self) if field.name != "margin_width")
            raise ConfigError(
                f"expected a positive weight of at least one loss of `objective`; got none; set "
                f"one of {known}"
            )

    def weights(self) -> dict[str, float]:
        """Return the positive weights by loss."""
        return {n: w for n, w in vars(self).items() if w > 0 and n != "margin_width"}

    def needs_pairs(self) -> bool:
        """Tell whether a loss compares two images of one caption."""
        return any(name in self.weights() for name in _PAIRED)

    def needs_logit_scale(self) -> bool:
        """Tell whether a loss depends on the temperature; hinges do not."""
        return any(name not in _UNSCALED for name in self.weights())

    def losses(self, batch: PreferenceFeatures, logit_scale: Tensor) -> dict[str, Tensor]:
        """Compute every weighted loss, unweighted, ``(B,)`` each; 0 for invalid captions.

        Args:
            batch: The features; carry gradient.
            logit_scale: Log of the inverse temperature, ``(1,)``; carries gradient.

        Raises:
            ConfigError: If a loss needs pairs and the batch has none.
        """
        if batch.preference_probs is None and self.needs_pairs():
            paired = ", ".join(name for name in _PAIRED if name in self.weights())
            raise ConfigError(
                f"expected preference pairs for `objective` ({paired}); got single images; set "
                "`data.content: preference`, or the weights of these losses to 0"
            )
        values = {n: self._loss(n, batch, logit_scale) for n in self.weights()}
        if batch.pair_weights is not None:
            values |= {n: batch.pair_weights * values[n] for n in values if n in _PAIRED}
        return {name: torch.where(batch.valid, value, 0) for name, value in values.items()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Sum losses by name with the weights, ``(B,)``."""
        return torch.stack([w * losses[name] for name, w in self.weights().items()]).sum(0)

    def _loss(self, name: str, batch: PreferenceFeatures, logit_scale: Tensor) -> Tensor:
        if name == "contrastive":
            captions = torch.arange(len(batch.captions), device=batch.mean.device)
            return self._contrast(
                OwnedFeatures(batch.mean, captions), batch.captions, batch, logit_scale
            )
        if name == "segment_contrastive":
            return self._contrast(batch.segments, batch.segment_texts, batch, logit_scale)
        probs, owner = batch.preference_probs, batch.segments.owner
        assert probs is not None
        scale = logit_scale.exp()
        if name == "pairwise":
            return pairwise_loss(scale * batch.pair_scores(), probs)
        if name == "segment_pairwise":
            return segment_pairwise_loss(scale * batch.segment_pair_scores(), owner, probs)
        if name == "margin":
            return pairwise_margin_loss(batch.pair_scores(), probs, self.margin_width)
        scores = batch.segment_pair_scores()
        return segment_pairwise_margin_loss(scores, owner, probs, self.margin_width)

    def _contrast(
        self, texts: OwnedFeatures, words: list[str], batch: PreferenceFeatures, scale: Tensor
    ) -> Tensor:
        keys = text_keys(words, batch.images.device)
        probs = batch.image_probs().to(batch.images)
        return contrastive_losses(texts, keys, batch.owned_images(), probs, batch.valid, scale)
