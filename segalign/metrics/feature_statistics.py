"""Number, sum and products of features: all that a Gaussian fit needs, exact.

Dims: N samples, d features.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from segalign.errors import DataError
from segalign.metrics.fixed_point import FEATURE_BITS, check_product_sums, from_grid, to_grid

_NAMES = ("num_samples", "grid_bits", "feature_sum", "product_sum")


class FeatureStatistics:
    """Sums over features on a grid, which do not depend on the order of samples.

    Args:
        num_samples: N, at least 0.
        feature_sum: Sum of features, whole numbers in float64 ``(d,)``.
        product_sum: Sum of f f^T, whole numbers in float64 ``(d, d)``.
        grid_bits: Features are multiples of ``2**-grid_bits``, which count 1 in both sums.

    Raises:
        DataError: If the sums are too large to be exact.
    """

    def __init__(
        self,
        num_samples: int,
        feature_sum: Tensor,
        product_sum: Tensor,
        grid_bits: int = FEATURE_BITS,
    ) -> None:
        check_product_sums(product_sum, grid_bits)
        self.num_samples = num_samples
        self.feature_sum = feature_sum
        self.product_sum = product_sum
        self.grid_bits = grid_bits

    @classmethod
    def of(cls, features: Tensor, grid_bits: int = FEATURE_BITS) -> Self:
        """Sum features.

        Args:
            features: Finite, ``(N, d)``, N of 0 included.
            grid_bits: The grid they are rounded to.

        Raises:
            DataError: If a feature is not finite, or they are too large for the grid.
        """
        check_finite(features)
        points = to_grid(features, grid_bits)
        return cls(len(points), points.sum(dim=0), points.T @ points, grid_bits)

    @property
    def num_features(self) -> int:
        """Width of the features, d."""
        return len(self.feature_sum)

    def merge(self, other: Self) -> Self:
        """Return the statistics of both sets of samples, which must have none in common.

        Raises:
            DataError: If grids or widths differ.
        """
        ours, others = ((one.grid_bits, one.num_features) for one in (self, other))
        if ours != others:
            raise DataError(
                "expected statistics of one grid and width to merge; got `grid_bits` and features "
                f"{ours} and {others}; compute both with the same settings"
            )
        return type(self)(
            self.num_samples + other.num_samples,
            self.feature_sum + other.feature_sum,
            self.product_sum + other.product_sum,
            self.grid_bits,
        )

    def mean(self) -> Tensor:
        """Return the mean, float64 ``(d,)``.

        Raises:
            DataError: If there is no sample.
        """
        self._check_count(1)
        return from_grid(self.feature_sum / self.num_samples, self.grid_bits)

    def covariance(self) -> Tensor:
        """Return the covariance with divisor N - 1, float64 ``(d, d)``.

        Raises:
            DataError: If there are fewer than two samples.
        """
        self._check_count(2)
        mean = self.feature_sum / self.num_samples
        centred = self.product_sum - torch.outer(self.feature_sum, mean)
        scatter = (centred + centred.T) / 2  # the outer product rounds its halves apart
        return from_grid(scatter / (self.num_samples - 1), 2 * self.grid_bits)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it as tensors, for a safetensors file."""
        return {
            "num_samples": torch.tensor([self.num_samples]),
            "grid_bits": torch.tensor([self.grid_bits]),
            "feature_sum": self.feature_sum.cpu().contiguous(),
            "product_sum": self.product_sum.cpu().contiguous(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Undo ``tensors``; others among them are left alone.

        Raises:
            DataError: If they are not those of statistics.
        """
        if missing := [name for name in _NAMES if name not in tensors]:
            raise DataError(
                f"expected tensors of feature statistics; `{missing[0]}` is missing; compute them "
                "again"
            )
        num_samples, grid_bits, feature_sum, product_sum = (tensors[name] for name in _NAMES)
        width = feature_sum.numel()
        for name, want in (("feature_sum", (width,)), ("product_sum", (width, width))):
            got = tensors[name]
            if got.shape != want or got.dtype != torch.float64 or not (got == got.round()).all():
                raise DataError(
                    f"expected `{name}` of feature statistics to be whole numbers in float64 of "
                    f"shape {want}; got {got.dtype} of shape {tuple(got.shape)}; compute them again"
                )
        return cls(int(num_samples), feature_sum, product_sum, int(grid_bits))

    def _check_count(self, least: int) -> None:
        if self.num_samples < least:
            raise DataError(
                f"expected features of at least {least} images; got {self.num_samples}; add images"
            )


def check_finite(features: Tensor) -> None:
    """Refuse features that are NaN or infinite.

    Raises:
        DataError: If there are such; it names the first row.
    """
    if (wrong := ~torch.isfinite(features).all(dim=-1)).any():
        raise DataError(
            f"expected finite features; got NaN or infinity in {int(wrong.sum())} of {len(wrong)} "
            f"rows, first in row {int(wrong.nonzero()[0])}; check the extractor's weights and dtype"
        )
