"""How alike images look to a network: those of other captions, those of one, and those of none.

With ``f_i`` the unit features of the N images that count, and ``c_i`` their captions:

- cross-prompt similarity: the mean of ``<f_i, f_j>`` over pairs with ``c_i != c_j``. It rises when
  a model makes one look for all captions.
- same-prompt similarity: the same over pairs ``i != j`` with ``c_i = c_j``. It rises when a model
  makes one image for all noise.
- similarity to V: the mean of ``<f_i, V>``, V the common direction of captions: what an image gets
  of a CLIP-type score whatever its caption says.

No pair is formed. With ``F`` the sum of all features, ``S_c`` that of a caption's ``n_c`` images,

    cross = (|F|^2 - sum_c |S_c|^2) / (N^2 - sum_c n_c^2)
    same  = (sum_c |S_c|^2 - N) / (sum_c n_c^2 - N)

Sums are of int64 on the grid of 2^-40, and so the same for any number of ranks.

Dims: B images of a micro-batch, C captions of it, n images of a caption, d width of features.

Reference: arXiv 2410.11817 (the common direction).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from segalign.evaluation.image_metric import EvaluationSetting, Findings, ImageBatch, ImageMetric
from segalign.metrics.extractors.protocol import ExtractorSource
from segalign.metrics.fixed_directions import fixed_direction
from segalign.metrics.fixed_point import check_value_sums, from_whole, to_whole
from segalign.metrics.place_values import PlaceValues, means
from segalign.metrics.reward_protocol import direction_protocol, reward_protocol
from segalign.metrics.scorer_features import shared_features
from segalign.ranks import gather_objects
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection

_TO_V = "image_to_v_similarity"


class ImageSimilarity(ImageMetric):
    """Mean cosines of the images' features with each other and, for a reward, with V.

    Images whose features are not finite are left out, and noted.

    Args:
        encoder: A CLIP-type reward that has been read, or the settings of a feature extractor,
            which has no V.
        name: Names the metric in result files.
        suffix: Stands behind the values' names, where several encoders look.
    """

    def __init__(
        self,
        encoder: ClipReward | ExtractorSource,
        name: str = "image_similarity",
        suffix: str = "",
    ) -> None:
        self.encoder = encoder
        self.name = name
        self.suffix = suffix
        self._known_protocol: dict[str, Any] | None = None

    @override
    def start(self, setting: EvaluationSetting) -> None:
        plan = setting.plan
        check_value_sums(plan.images_per_caption, plan.num_images)
        self._plan = plan
        self._cosines = PlaceValues()
        self._sum: Tensor | None = None
        self._squares = self._num_images = self._num_ordered = self._num_lost = 0
        self._embed = self._open(setting)
        self._direction: Tensor | None = None
        if isinstance(self.encoder, ClipReward):
            self._direction = fixed_direction(self.encoder, setting)

    @override
    def update(self, batch: ImageBatch) -> None:
        features = F.normalize(self._embed(batch).double(), dim=-1)
        wanted = batch.counted.to(features.device)
        counted = wanted & features.isfinite().all(dim=-1)
        self._num_lost += int((wanted & ~counted).sum())
        if self._direction is not None:
            cosines = features @ self._direction.to(features)
            self._cosines.add(batch.places, counted, {self._named(_TO_V): cosines})
        kept = torch.where(counted.unsqueeze(-1), features, 0)
        per_caption = self._plan.images_per_caption
        of_captions = kept.view(-1, per_caption, kept.shape[-1])
        counts = counted.view(-1, per_caption).sum(dim=1)
        squares = of_captions.sum(dim=1).square().sum(dim=-1)
        total = to_whole(kept).sum(dim=0).cpu()
        self._sum = total if self._sum is None else self._sum + total
        self._squares += int(to_whole(squares).sum())
        self._num_images += int(counts.sum())
        self._num_ordered += int(counts.square().sum())

    @override
    def finish(self) -> Findings:
        own = [self._squares, self._num_images, self._num_ordered, self._num_lost]
        own += [] if self._sum is None else self._sum.tolist()
        # A rank without batches does not know the width.
        parts = [part for part in gather_objects(own) if len(part) > 4]
        sums = [sum(column) for column in zip(*parts, strict=True)]
        squares, num_images, num_ordered, num_lost, *total = sums
        found = self._cosines.join(self._plan.num_images)
        values = mean_cosines(total, squares, num_images, num_ordered)
        return Findings(
            {self._named(name): value for name, value in values.items()} | means(found),
            self._protocol(),
            per_image=found,
            notes=self._notes(num_lost),
        )

    def _notes(self, num_lost: int) -> list[str]:
        if not num_lost:
            return []
        return [f"{self.name}: {num_lost} images are left out, whose features are not finite"]

    def _named(self, name: str) -> str:
        return f"{name}{self.suffix}"

    def _open(self, setting: EvaluationSetting) -> Callable[[ImageBatch], Tensor]:
        """Return what gives the features of a batch, shared with other metrics."""
        if isinstance(self.encoder, ClipReward):
            shared = shared_features(self.encoder, setting)
            return lambda batch: batch.once(shared)
        extractor = setting.pool.load(self.encoder).to(setting.device)
        self._known_protocol = extractor.protocol()
        return lambda batch: batch.once(extractor).features

    def _protocol(self) -> dict[str, Any]:
        if self._known_protocol is None:
            assert isinstance(self.encoder, ClipReward)
            described = reward_protocol(self.encoder)
            kept = {key: described[key] for key in ("weights", "dtype", "images", "text")}
            estimate = self.encoder.common_direction
            is_corpus = isinstance(estimate, CorpusDirection)
            source = direction_protocol(estimate) if is_corpus else "captions of the evaluation"
            self._known_protocol = kept | {"common_direction": source}
        return {"metric": "image_similarity", "encoder": self._known_protocol}


def mean_cosines(
    total: Sequence[int], squares: int, num_images: int, num_ordered: int
) -> dict[str, float]:
    """Turn sums of unit features into mean cosines of pairs; those without a pair are left out.

    Args:
        total: The sum F, on the grid of 2^-40, ``d`` numbers.
        squares: The sum of the ``|S_c|^2``, on the same grid.
        num_images: N.
        num_ordered: The sum of the ``n_c^2``.
    """
    length = math.fsum(x * x for x in from_whole(torch.tensor(total)).tolist())
    within = float(from_whole(torch.tensor(squares)))
    cosines = {}
    if num_images**2 > num_ordered:
        cosines["cross_prompt_similarity"] = (length - within) / (num_images**2 - num_ordered)
    if num_ordered > num_images:
        cosines["same_prompt_similarity"] = (within - num_images) / (num_ordered - num_images)
    return cosines
