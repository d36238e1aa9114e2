"""The Frechet distance between features of real and generated images.

Dims: B rows, d features.
"""

from typing import Any, Final

from torch import Tensor
from typing_extensions import override

from segalign.errors import ConfigError, DataError
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.feature_sums import FeatureSumMetric
from segalign.metrics.fixed_point import FEATURE_BITS
from segalign.metrics.frechet import frechet_distance
from segalign.metrics.recovering_metric import TooFewImagesError

_LEAST: Final = 2


class FrechetDistance(FeatureSumMetric):
    """Frechet distance of Gaussian fits, such as FID with the features of Inception.

    Every sample counts once, and any order, chunks and ranks give the same bits. One rank computes
    the distance for all. See ``segalign.metrics.fixed_point`` for the grid and
    ``segalign.metrics.frechet`` for the formula.

    Args:
        num_features: Width of the features, d.
        num_generated: Ids of generated images are below it.
        real: Statistics of the real images, or the number of them, which come through ``update``
            then, with ids of their own.
        grid_bits: Features are rounded to multiples of ``2**-grid_bits``; must be that of the
            statistics.
        allow_few_samples: Compute also with less than d + 1 samples on a side, where the fit is
            singular and the distance says as much of the number of samples as of them.
        settings: Those of ``torchmetrics.Metric``.

    Attributes:
        num_real: Real images of the last distance, over all ranks.
        num_generated: Generated images of it.

    Raises:
        ConfigError: If the statistics have another width or grid.
    """

    higher_is_better = False
    num_real: int = 0
    num_generated: int = 0

    def __init__(
        self,
        num_features: int,
        num_generated: int,
        *,
        real: FeatureStatistics | int,
        grid_bits: int = FEATURE_BITS,
        allow_few_samples: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, grid_bits=grid_bits, **settings)
        self.allow_few_samples = allow_few_samples
        self.reference = None if isinstance(real, int) else real
        self.add_side("generated", num_generated)
        if isinstance(real, int):
            self.add_side("real", real)
        elif (real.num_features, real.grid_bits) != (num_features, grid_bits):
            raise ConfigError(
                f"expected real statistics of {num_features} features on a grid of 2^-{grid_bits}; "
                f"got {real.num_features} on 2^-{real.grid_bits}; compute them with the same "
                "settings"
            )

    @override
    def update(
        self, features: Tensor, sample_ids: Tensor, counted: Tensor, *, real: bool = False
    ) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            sample_ids: int64 ``(B,)``.
            counted: Rows to count, bool ``(B,)``.
            real: Whether they are of real images.

        Raises:
            DataError: If counted features are not finite, too large for the grid, or real ones come
                though their statistics are given; nothing is changed.
        """
        if real and self.reference is not None:
            raise DataError(
                "expected generated images alone, as statistics of the real ones are given; got "
                "real ones; make the metric with their number instead"
            )
        self.take("real" if real else "generated", features, sample_ids, counted)

    @override
    def compute(self) -> Tensor:
        """Return the squared distance, float64 scalar; see ``frechet_distance``.

        Raises:
            TooFewImagesError: If a side has too few samples, at least fewer than two.
        """
        generated = self.side_statistics("generated")
        real = self.side_statistics("real") if self.reference is None else self.reference
        self.num_real, self.num_generated = real.num_samples, generated.num_samples
        for side, statistics in (("real", real), ("generated", generated)):
            count = statistics.num_samples
            too_few = few_samples(side, count, self.num_features)
            if too_few and not self.allow_few_samples:
                raise TooFewImagesError(
                    f"{too_few}; add images, or allow it by `allow_few_samples`"
                )
            if count < _LEAST:
                raise TooFewImagesError(
                    f"expected at least {_LEAST} {side} images for a covariance; got {count}; add "
                    "images"
                )
        return self.computed_once(
            lambda: frechet_distance(
                real.mean(), real.covariance(), generated.mean(), generated.covariance()
            ).reshape(1),
            count=1,
        )[0]


def few_samples(side: str, num_samples: int, num_features: int) -> str | None:
    """Say that there are too few samples to fit a Gaussian, or return None if there are enough."""
    if num_samples > num_features:
        return None
    return (
        f"expected more {side} images than features ({num_features}), so that a covariance of full "
        f"rank can be fitted; got {num_samples}"
    )
