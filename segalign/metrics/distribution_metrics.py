"""Frechet distance, inception score and kernel distance of an evaluation's images.

Dims: d features, c classes.
"""

from typing import Any, Final, Literal

import torch
from torch import Tensor
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.image_metric import (
    EvaluationSetting,
    Findings,
    ImageBatch,
    ImageMetric,
)
from segalign.metrics.extractors.protocol import ExtractorSource, FeatureExtractor
from segalign.metrics.frechet_distance import FrechetDistance, few_samples
from segalign.metrics.inception_score import InceptionScore
from segalign.metrics.kernel_distance import KernelDistance
from segalign.metrics.kernels import Estimator, Kernel, PolynomialKernel
from segalign.metrics.metric_protocol import weight_notes
from segalign.metrics.recovering_metric import TooFewImagesError
from segalign.metrics.reference_statistics import ReferenceSource

_PROBE_SIZE: Final = 64


class FrechetImageMetric(ImageMetric):
    """Frechet distance of generated images from real ones; FID with Inception's features.

    Sums are kept on the CPU, where float64 is exact whatever the images were made on. Where failed
    images leave too few, there is no value, and a note. The number of images is part of the
    protocol: the distance depends on it.

    Args:
        name: Of the metric and of its value.
        extractor_source: The extractor.
        reference: Statistics of the real images, which say the grid too.
        allow_few_images: Compute also with fewer images than features; the findings say so.
    """

    def __init__(
        self,
        name: str,
        extractor_source: ExtractorSource,
        reference: ReferenceSource,
        *,
        allow_few_images: bool = False,
    ) -> None:
        self.name = name
        self.extractor_source = extractor_source
        self.reference = reference
        self.allow_few_images = allow_few_images

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """Load the extractor and the statistics, and count the images."""
        self.extractor = load_extractor(self.extractor_source, setting)
        self._check_count("generated", setting.plan.num_images)
        self.real = self.reference.statistics(self.extractor, setting)
        self.real.check(self.extractor.protocol())
        statistics = self.real.statistics
        self._check_count("real", statistics.num_samples)
        self.metric = FrechetDistance(
            self.extractor.num_features,
            setting.plan.num_images,
            real=statistics,
            grid_bits=statistics.grid_bits,
            allow_few_samples=self.allow_few_images,
        )

    @override
    def update(self, batch: ImageBatch) -> None:
        """Sum features."""
        self.metric.update(batch.once(self.extractor).features, batch.places, batch.counted)

    @override
    def finish(self) -> Findings:
        """Return the distance, or say why there is none."""
        try:
            values = {self.name: float(self.metric.compute())}
        except TooFewImagesError:
            values = {}
        return Findings(values, self._protocol(), notes=self._notes(has_value=bool(values)))

    def _check_count(self, side: str, count: int) -> None:
        too_few = few_samples(side, count, self.extractor.num_features)
        if too_few and not self.allow_few_images:
            raise ConfigError(f"{too_few}; add images, or set `allow_few_images: true`")

    def _protocol(self) -> dict[str, Any]:
        return {
            "metric": "frechet_distance",
            "extractor": self.extractor.protocol(),
            "reference": self.real.protocol,
            "num_real": self.metric.num_real,
            "num_generated": self.metric.num_generated,
            "grid_bits": self.metric.grid_bits,
            "covariance": "N - 1",
            "dtype": "float64",
        }

    def _notes(self, *, has_value: bool) -> list[str]:
        counts = {"generated": self.metric.num_generated, "real": self.metric.num_real}
        found = [few_samples(*side, self.extractor.num_features) for side in counts.items()]
        advice = "compare it at equal counts only"
        if not has_value:
            advice = "so there is no value; add images"
            advice += "" if self.allow_few_images else ", or set `allow_few_images: true`"
        return [
            *weight_notes(self.name, self.extractor.protocol()),
            *(f"{self.name}: {one}; {advice}" for one in found if one),
        ]


class InceptionScoreImageMetric(ImageMetric):
    """Inception score of generated images.

    It grows with the number of images, which is part of the protocol therefore.

    Args:
        name: Of the metric and of its value; the deviation is ``NAME_std``.
        extractor_source: The extractor, with a classifier.
        num_splits: See ``InceptionScore``.
        ddof: See ``InceptionScore``.
    """

    def __init__(
        self,
        name: str,
        extractor_source: ExtractorSource,
        *,
        num_splits: int = 10,
        ddof: Literal[0, 1] = 0,
    ) -> None:
        self.name = name
        self.extractor_source = extractor_source
        self.num_splits = num_splits
        self.ddof: Literal[0, 1] = ddof

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """Load the extractor, and see that it has a classifier."""
        self.extractor = load_extractor(self.extractor_source, setting)
        shape = (1, 3, _PROBE_SIZE, _PROBE_SIZE)
        probe = torch.zeros(shape, dtype=torch.uint8, device=setting.device)
        logits = self.extractor(probe).logits
        if logits is None:
            raise ConfigError(
                f"expected an extractor with a classifier for `{self.name}`; "
                f"`{self.extractor.protocol().get('name')}` has none; take Inception, for one"
            )
        self.metric = InceptionScore(
            logits.shape[1],
            setting.plan.num_images,
            num_splits=self.num_splits,
            ddof=self.ddof,
        )

    @override
    def update(self, batch: ImageBatch) -> None:
        """Sum probabilities."""
        self.metric.update(batch.once(self.extractor).logits, batch.places, batch.counted)

    @override
    def finish(self) -> Findings:
        """Return mean and deviation over splits."""
        found = self.metric.compute()
        values = {self.name: float(found["mean"]), f"{self.name}_std": float(found["std"])}
        protocol = {
            "metric": "inception_score",
            "extractor": self.extractor.protocol(),
            "num_generated": int(found["num_samples"]),
            "num_splits": self.num_splits,
            "splits": "hash of the place",
            "ddof": self.ddof,
            "dtype": "float64",
        }
        notes = weight_notes(self.name, self.extractor.protocol())
        if empty := int(found["num_empty_splits"]):
            notes.append(f"{self.name}: {empty} of {self.num_splits} splits are empty and left out")
        return Findings(values, protocol, notes=notes)


class KernelImageMetric(ImageMetric):
    """Kernel distance of generated images from real ones: KID, or CMMD with CLIP's features.

    Where failed images leave too few, there is no value, and a note. The unbiased estimator does
    not depend on the number of images, so that numbers of a few more or less may be compared; the
    biased one does, and has it in its protocol.

    Args:
        name: Of the metric and of its value; the deviation over subsets is ``NAME_std``.
        extractor_source: The extractor.
        reference: Statistics of the real images, with rows.
        kernel: None is KID's.
        num_subsets: See ``KernelDistance``; 0 takes all images at once.
        subset_size: See ``KernelDistance``.
        estimator: See ``segalign.metrics.kernels.squared_distance``.
    """

    def __init__(
        self,
        name: str,
        extractor_source: ExtractorSource,
        reference: ReferenceSource,
        *,
        kernel: Kernel | None = None,
        num_subsets: int = 0,
        subset_size: int = 1000,
        estimator: Estimator = "unbiased",
    ) -> None:
        self.name = name
        self.extractor_source = extractor_source
        self.reference = reference
        self.kernel = kernel
        self.num_subsets = num_subsets
        self.subset_size = subset_size
        self.estimator: Estimator = estimator

    @override
    def start(self, setting: EvaluationSetting) -> None:
        """Load the extractor and the real rows, and count the images."""
        self.extractor = load_extractor(self.extractor_source, setting)
        self._check_count("generated", setting.plan.num_images)
        self.real = self.reference.statistics(self.extractor, setting)
        self.real.check(self.extractor.protocol())
        self._check_count("real", len(rows := self._rows()))
        self.metric = KernelDistance(
            self.extractor.num_features,
            kernel=self.kernel,
            real_rows=rows,
            num_subsets=self.num_subsets,
            subset_size=self.subset_size,
            estimator=self.estimator,
        )

    @override
    def update(self, batch: ImageBatch) -> None:
        """Keep features."""
        self.metric.update(batch.once(self.extractor).features, batch.places, batch.counted)

    @override
    def finish(self) -> Findings:
        """Return the distance, or say why there is none."""
        notes = weight_notes(self.name, self.extractor.protocol())
        try:
            found = self.metric.compute()
        except TooFewImagesError as error:
            return Findings({}, self._protocol(), notes=[*notes, f"{self.name}: no value; {error}"])
        values = {self.name: float(found["distance"])}
        if "std" in found:
            values[f"{self.name}_std"] = float(found["std"])
        protocol = self._protocol()
        if self.estimator == "biased":
            protocol["num_generated"] = int(found["num_generated"])
        return Findings(values, protocol, notes=notes)

    def _protocol(self) -> dict[str, Any]:
        kernel = self.kernel or PolynomialKernel()
        subsets = {"count": self.num_subsets, "size": self.subset_size, "seed": 0, "ddof": 0}
        return {
            "metric": "kernel_distance",
            "extractor": self.extractor.protocol(),
            "reference": self.real.protocol,
            "num_real": len(self._rows()),
            "kernel": kernel.protocol(),
            "estimator": self.estimator,
            "subsets": subsets if self.num_subsets else "all images",
            "dtype": "float64",
        }

    def _check_count(self, side: str, count: int) -> None:
        least = max(self.subset_size if self.num_subsets else 0, 2)
        if count < least:
            raise ConfigError(
                f"expected at least {least} {side} images for `{self.name}`; got {count}; add "
                "images, or lower `subset_size`"
            )

    def _rows(self) -> Tensor:
        if self.real.rows is None:
            raise ConfigError(
                f"expected features of the real images one by one for `{self.name}`; the reference "
                "statistics hold sums alone; make them again, with rows"
            )
        return self.real.rows


def load_extractor(source: ExtractorSource, setting: EvaluationSetting) -> FeatureExtractor:
    """Load an extractor, once for all metrics with equal settings, on the evaluation's device."""
    extractor: FeatureExtractor = setting.pool.load(source)
    return extractor.to(setting.device)
