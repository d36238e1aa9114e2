"""Retrieval of images by their long captions, and of captions by their images.

Dims: B batch, N samples, T readings of a caption, E joint-embedding width.

Reference: arXiv 2410.11817, the tables of retrieval by text embedding and by number of sentences.
"""

from collections.abc import Sequence
from typing import Any, Final, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from segalign.errors import ConfigError, DataError
from segalign.losses.contrastive import text_keys
from segalign.metrics.host_gather import gather_to_host
from segalign.metrics.ranking import MAX_LENGTH, from_fixed_point, gallery_ranks, to_fixed_point
from segalign.rewards.decomposition import text_relevant, unit_mean

TEXT_PARTS: Final = ("C", "C_perp")
DIRECTIONS: Final = ("text_to_image", "image_to_text")
CUTOFFS: Final = (1, 5, 10)


class RetrievalResult(TypedDict):
    """What retrieval found.

    Attributes:
        recall: Share of queries whose right answer is among the first k, float64, by
            (``TEXT_PARTS``, T readings, ``DIRECTIONS``, ``CUTOFFS``).
        num_samples: Samples that were ranked.
        num_left_out: Samples of the last gallery, which was not full.
        num_captions: Distinct captions of all samples, those left out included.
        gallery_size: Samples of each gallery.
        num_galleries: Galleries.
    """

    recall: Tensor
    num_samples: Tensor
    num_left_out: Tensor
    num_captions: Tensor
    gallery_size: Tensor
    num_galleries: Tensor


class Retrieval(Metric):
    """Recall at 1, 5 and 10 in galleries of images and captions, both ways.

    Samples are told apart by their ids: those that a sampler served twice count once, and neither
    order nor ranks matter. Galleries are consecutive in the order of ids; a last one that is not
    full is left out. Every rank gathers all features in its host memory, as float32.

    For every reading there is C, its features, and C_perp, the part of them that is orthogonal to
    the common direction V. Images are the same for both. See ``gallery_ranks`` for ties and equal
    captions, and ``to_fixed_point`` for what makes results exact.

    Args:
        num_readings: T.
        gallery_size: Samples of a gallery; None ranks all samples in one.
        common_direction: V, ``(E,)``; None estimates one for each reading, from all samples.
        settings: Those of ``torchmetrics.Metric``.
    """

    full_state_update = False
    higher_is_better = True
    sample_ids: list[Tensor]
    caption_keys: list[Tensor]
    image_features: list[Tensor]
    text_features: list[Tensor]

    def __init__(
        self,
        num_readings: int,
        *,
        gallery_size: int | None = None,
        common_direction: Tensor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**{"dist_sync_fn": gather_to_host, **settings})
        if gallery_size is not None and gallery_size < 2:
            raise ConfigError(
                f"expected `gallery_size` to be at least 2; got {gallery_size}; raise it, or give "
                "null for one gallery of all samples"
            )
        self.num_readings = num_readings
        self.gallery_size = gallery_size
        self.common_direction = common_direction
        for state in ("sample_ids", "caption_keys", "image_features", "text_features"):
            self.add_state(state, [], dist_reduce_fx="cat")

    @override
    def update(
        self,
        sample_ids: Tensor,
        captions: Sequence[str],
        image_features: Tensor,
        text_features: Tensor,
        valid: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            sample_ids: int64 ``(B,)``.
            captions: ``B`` captions.
            image_features: Unit vectors ``(B, E)``.
            text_features: Unit vectors or means of them, ``(B, T, E)``.
            valid: Rows to take, bool ``(B,)``.

        Raises:
            DataError: If features are not finite, or longer than 1.
        """
        kept = valid.cpu()
        ids = sample_ids.cpu()[kept]
        images, texts = (
            features.detach().float().cpu()[kept] for features in (image_features, text_features)
        )
        _check_features(ids, images, texts)
        self.sample_ids.append(ids)
        self.caption_keys.append(text_keys(captions)[kept])
        self.image_features.append(images)
        self.text_features.append(texts)

    @override
    def compute(self) -> RetrievalResult:
        """Rank all samples.

        Raises:
            DataError: If there are fewer samples than a gallery, or an id stands for two captions.
        """
        ids, keys, images, texts = self._rows()
        size = len(ids) if self.gallery_size is None else self.gallery_size
        if len(ids) < max(size, 2):
            raise DataError(
                f"expected at least {max(size, 2)} images with captions for a retrieval gallery; "
                f"got {len(ids)}; add samples, or lower `gallery_size`"
            )
        num_galleries = len(ids) // size
        galleries = [slice(start * size, (start + 1) * size) for start in range(num_galleries)]
        image_points = to_fixed_point(images)
        recall = [
            torch.stack([_recall(image_points, part, keys, galleries) for part in parts])
            for parts in map(self._text_parts, texts.unbind(dim=1))
        ]
        return {
            "recall": torch.stack(recall, dim=1),
            "num_samples": torch.tensor(num_galleries * size),
            "num_left_out": torch.tensor(len(ids) - num_galleries * size),
            "num_captions": torch.tensor(len(torch.unique(keys))),
            "gallery_size": torch.tensor(size),
            "num_galleries": torch.tensor(num_galleries),
        }

    def _rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ids, caption keys, image and text features of all samples, in order of ids."""
        if not sum(ids.numel() for ids in self.sample_ids):
            nothing = torch.zeros(0, dtype=torch.int64)
            return nothing, nothing, torch.zeros(0, 0), torch.zeros(0, self.num_readings, 0)
        ids, order = torch.sort(dim_zero_cat(self.sample_ids), stable=True)
        keys = dim_zero_cat(self.caption_keys)[order]
        is_again = torch.cat([torch.tensor([False]), ids[1:] == ids[:-1]])
        clashes = is_again[1:] & (keys[1:] != keys[:-1])
        if clashes.any():
            clash = int(ids[1:][clashes][0])
            raise DataError(
                f"expected sample ids that tell samples apart; {clash} stands for two captions; "
                "evaluate one data set at a time"
            )
        order = order[~is_again]
        images, texts = dim_zero_cat(self.image_features), dim_zero_cat(self.text_features)
        return ids[~is_again], keys[~is_again], images[order], texts[order]

    def _text_parts(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return C and C_perp of one reading ``(N, E)``, in fixed point."""
        points = to_fixed_point(texts)
        if self.common_direction is None:
            # Whole numbers are summed exactly, so V does not depend on how the sum is made.
            direction = unit_mean(from_fixed_point(points.sum(dim=0)), len(points))
        else:
            direction = self.common_direction.double()
        return points, to_fixed_point(text_relevant(texts.double(), direction))


def chance_recall(cutoff: int, gallery_size: int) -> float:
    """Return what guessing finds among the first ``cutoff`` of a gallery of distinct captions."""
    return min(cutoff / gallery_size, 1.0)


def _recall(images: Tensor, texts: Tensor, keys: Tensor, galleries: Sequence[slice]) -> Tensor:
    """Return the recall of one reading, by direction and cutoff."""
    ranks = [gallery_ranks(images[one], texts[one], keys[one]) for one in galleries]
    both = torch.stack([torch.cat(found) for found in zip(*ranks, strict=True)])
    return torch.stack([(both < cutoff).double().mean(dim=-1) for cutoff in CUTOFFS], dim=-1)


def _check_features(ids: Tensor, images: Tensor, texts: Tensor) -> None:
    """Refuse features that are not finite or too long.

    Raises:
        DataError: If there are such.
    """
    lengths = torch.cat([images.unsqueeze(1), texts], dim=1).norm(dim=-1).amax(dim=1)
    if (wrong := ~(lengths <= MAX_LENGTH)).any():
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"expected finite features of length at most 1; those of sample {int(ids[row])} have "
            f"length {lengths[row].item():.3g}; check the scorer's weights and dtype"
        )
