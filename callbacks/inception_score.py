"""Inception score of generated images, while training and after."""

from collections.abc import Sequence

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from segalign.evaluation.image_metric import ImageMetric
from segalign.metrics.distribution_metrics import InceptionScoreImageMetric
from segalign.metrics.extractors.inception import InceptionV3
from segalign.metrics.extractors.protocol import ExtractorSource


class InceptionScore(ImageMetricCallback):
    """Log the inception score and its deviation over splits; a legacy figure.

    An image's split is a function of its place in the evaluation, so that neither order nor ranks
    matter.

    Args:
        extractor: What sees the images and has a classifier; null is Inception with the published
            weights.
        num_splits: Parts of the images; the score depends on it.
        name: Logged as ``val/NAME`` and ``val/NAME_std``.
    """

    def __init__(
        self,
        extractor: ExtractorSource | None = None,
        num_splits: PositiveInt = 10,
        name: str = "inception_score",
    ) -> None:
        super().__init__()
        self.extractor = extractor or InceptionV3()
        self.num_splits = num_splits
        self.name = name

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        return [InceptionScoreImageMetric(self.name, self.extractor, num_splits=self.num_splits)]
