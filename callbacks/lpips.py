"""Perceptual distances between generated images: diversity, and drift from the start."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from segalign.evaluation.image_metric import ImageMetric
from segalign.metrics.diversity import Diversity
from segalign.metrics.drift import Drift
from segalign.metrics.perceptual.lpips import Lpips
from segalign.metrics.perceptual.protocol import PerceptualSource


class LPIPS(ImageMetricCallback):
    """Log how much images of a caption differ, and how far images have moved since the start.

    ``val/NAME_diversity`` is the mean distance of images of one caption, of which the evaluation
    makes several (``images_per_caption``); ``val/NAME_drift`` the mean distance to the image of the
    same caption and noise before training; ``val/NAME_drift_ratio`` is the drift by the diversity
    of the start.

    Args:
        network: The distance; null is LPIPS on AlexNet with the published weights.
        name: Of the distance. Name it otherwise where it is not LPIPS.
    """

    def __init__(self, network: PerceptualSource | None = None, name: str = "lpips") -> None:
        super().__init__()
        self.network = network or Lpips()
        self.name = name

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        counts = [getattr(callback, "images_per_caption", 1) for callback in callbacks]
        drift = Drift(self.network, name=f"{self.name}_drift")
        if max(counts, default=1) < 2:
            return [drift]
        return [Diversity(self.network, name=f"{self.name}_diversity"), drift]
