"""Kernel distances of generated images, KID and CMMD, while training and after."""

from collections.abc import Sequence

import lightning.pytorch as pl
from jsonargparse.typing import NonNegativeInt, PositiveInt
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from callbacks.real_images import real_images
from segalign.evaluation.image_metric import ImageMetric
from segalign.metrics.distribution_metrics import KernelImageMetric
from segalign.metrics.extractors.inception import InceptionV3
from segalign.metrics.extractors.protocol import ExtractorSource
from segalign.metrics.extractors.transformers_tower import TransformersTower
from segalign.metrics.kernels import GaussianKernel

_CMMD_MODEL = "openai/clip-vit-large-patch14-336"


class KID(ImageMetricCallback):
    """Log the kernel inception distance of generated from real images; unbiased for few images.

    Features are gathered in the main memory of ranks alone.

    Args:
        extractor: What sees the images; null is Inception with the published weights.
        reference: Other real images: a folder of shards, or a file of ``main.py stats``.
        image_size: Side of the real images in pixels; null is the datamodule's, or the file's.
        num_reference: How many real images; null is all.
        num_subsets: Draws of ``subset_size`` images whose distances are averaged; 0 compares all
            images at once, which is the more precise.
        subset_size: Images of each draw.
        name: Logged as ``val/NAME``, with draws also ``val/NAME_std``.
    """

    needs_rows = True

    def __init__(
        self,
        extractor: ExtractorSource | None = None,
        reference: str | None = None,
        image_size: PositiveInt | None = None,
        num_reference: PositiveInt | None = None,
        num_subsets: NonNegativeInt = 0,
        subset_size: PositiveInt = 1000,
        name: str = "kid",
    ) -> None:
        super().__init__()
        self.extractor = extractor or InceptionV3()
        self.reference = reference
        self.image_size = image_size
        self.num_reference = num_reference
        self.num_subsets = num_subsets
        self.subset_size = subset_size
        self.name = name

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        real = real_images(trainer, self.reference, self.image_size, self.num_reference)
        return [
            KernelImageMetric(
                self.name,
                self.extractor,
                real,
                num_subsets=self.num_subsets,
                subset_size=self.subset_size,
            )
        ]


class CMMD(ImageMetricCallback):
    """Log the CLIP maximum mean discrepancy of generated from real images.

    Args:
        extractor: What sees the images; null is CLIP-L at 336 pixels.
        reference: Other real images: a folder of shards, or a file of ``main.py stats``.
        image_size: Side of the real images in pixels; null is the datamodule's, or the file's.
        num_reference: How many real images; null is all.
        name: Logged as ``val/NAME``.

    Reference: arXiv 2401.09603.
    """

    needs_rows = True

    def __init__(
        self,
        extractor: ExtractorSource | None = None,
        reference: str | None = None,
        image_size: PositiveInt | None = None,
        num_reference: PositiveInt | None = None,
        name: str = "cmmd",
    ) -> None:
        super().__init__()
        self.extractor = extractor or TransformersTower(_CMMD_MODEL)
        self.reference = reference
        self.image_size = image_size
        self.num_reference = num_reference
        self.name = name

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        real = real_images(trainer, self.reference, self.image_size, self.num_reference)
        return [KernelImageMetric(self.name, self.extractor, real, kernel=GaussianKernel())]
