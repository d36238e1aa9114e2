"""Frechet inception distance of generated images, while training and after."""

from collections.abc import Sequence

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from callbacks.real_images import real_images
from segalign.evaluation.image_metric import ImageMetric
from segalign.metrics.distribution_metrics import FrechetImageMetric
from segalign.metrics.extractors.inception import InceptionV3
from segalign.metrics.extractors.protocol import ExtractorSource


class FID(ImageMetricCallback):
    """Log the Frechet distance between features of generated and of real images.

    The real ones are those of the validation shards; their statistics are computed once and kept
    beside them. Sums are whole numbers: the result is the same bits for any number of ranks.

    Args:
        extractor: What sees the images; null is Inception with the published weights. With another
            one give the number another ``name``, such as ``fd_dinov2``.
        reference: Other real images: a folder of shards, or a file of ``main.py stats``.
        image_size: Side of the real images in pixels; null is the datamodule's, or the file's.
        num_reference: How many real images; null is all.
        allow_few_images: Compute with fewer images than features too, where the covariance is
            singular and the number says little; it is noted.
        name: Logged as ``val/NAME``.
    """

    def __init__(
        self,
        extractor: ExtractorSource | None = None,
        reference: str | None = None,
        image_size: PositiveInt | None = None,
        num_reference: PositiveInt | None = None,
        allow_few_images: bool = False,
        name: str = "fid",
    ) -> None:
        super().__init__()
        self.extractor = extractor or InceptionV3()
        self.reference = reference
        self.image_size = image_size
        self.num_reference = num_reference
        self.allow_few_images = allow_few_images
        self.name = name

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        wanted = (self.reference, self.image_size, self.num_reference)
        real = real_images(trainer, *wanted, keep_rows=False)
        few = self.allow_few_images
        return [FrechetImageMetric(self.name, self.extractor, real, allow_few_images=few)]
