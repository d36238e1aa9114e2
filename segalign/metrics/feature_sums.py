"""Statistics of features, summed as they come, over ranks.

Dims: B rows, d features.
"""

from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from segalign.errors import DataError
from segalign.metrics.feature_statistics import FeatureStatistics, check_finite
from segalign.metrics.fixed_point import FEATURE_BITS, check_square_sums, to_grid
from segalign.metrics.sum_metric import SumMetric

# Every product of rows reads and writes the whole of a (d, d) state, so few rows wait for others.
_ROWS_AT_ONCE: Final = 256


class FeatureSumMetric(SumMetric):
    """Base of metrics that sum features of one or two sets of images.

    Rows wait on the grid until there are 256, or the sums are asked for. Sums are exact, so that it
    does not show.

    Args:
        num_features: Width of the features, d.
        grid_bits: Features are rounded to multiples of ``2**-grid_bits``.
        settings: Those of ``torchmetrics.Metric``.
    """

    def __init__(
        self, num_features: int, *, grid_bits: int = FEATURE_BITS, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.num_features = num_features
        self.grid_bits = grid_bits
        self._waiting: dict[str, list[Tensor]] = {}
        self._waiting_squares: dict[str, Tensor] = {}

    def add_side(self, side: str, num_samples: int) -> None:
        """Add the states of a set of images with ids below ``num_samples``."""
        self.add_ids(f"{side}_ids", num_samples)
        self.add_sum(f"{side}_sum", self.num_features, dtype=torch.float64)
        self.add_sum(f"{side}_products", self.num_features, self.num_features, dtype=torch.float64)

    def take(self, side: str, features: Tensor, sample_ids: Tensor, counted: Tensor) -> None:
        """Sum the rows that are counted and new.

        Raises:
            DataError: If they are not finite, of another width, or too large; nothing is changed.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise DataError(
                f"expected features of shape (B, {self.num_features}); got "
                f"{tuple(features.shape)}; set `num_features` to the extractor's"
            )
        rows = self.new_rows(f"{side}_ids", sample_ids, counted)
        new = features.detach()[rows.to(features.device)].to(self.device)
        check_finite(new)
        points = to_grid(new, self.grid_bits)
        products: Tensor = getattr(self, f"{side}_products")
        squares = points.square().sum(dim=0)
        if side in self._waiting:
            squares += self._waiting_squares[side].to(squares.device)
        check_square_sums(products.diagonal() + squares, self.grid_bits)
        self._waiting.setdefault(side, []).append(points)
        self._waiting_squares[side] = squares
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + points.sum(dim=0))
        self.mark(f"{side}_ids", sample_ids.cpu()[rows])
        if sum(map(len, self._waiting[side])) >= _ROWS_AT_ONCE:
            self._sum_waiting()

    def _sum_waiting(self) -> None:
        """Put the products of rows that wait into the states."""
        for side, parts in self._waiting.items():
            products: Tensor = getattr(self, f"{side}_products")
            rows = torch.cat([part.to(products.device) for part in parts])
            setattr(self, f"{side}_products", torch.addmm(products, rows.T, rows))
        self._waiting, self._waiting_squares = {}, {}

    @property
    @override
    def metric_state(self) -> dict[str, list[Tensor] | Tensor]:
        """The states, of all rows."""
        self._sum_waiting()
        return super().metric_state

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See ``RecoveringMetric``."""
        self._sum_waiting()
        return super().forward(*args, **kwargs)

    @override
    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Sum over ranks; ``compute`` calls it, and with one rank nothing else is done."""
        self._sum_waiting()
        super().sync(*args, **kwargs)

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the states that are to be kept."""
        self._sum_waiting()
        return super().state_dict(*args, **kwargs)

    @override
    def reset(self) -> None:
        """Forget all rows."""
        self._waiting, self._waiting_squares = {}, {}
        super().reset()

    def side_statistics(self, side: str) -> FeatureStatistics:
        """Return the statistics of a set of images, on the CPU."""
        return FeatureStatistics(
            int(getattr(self, f"{side}_ids").sum()),
            getattr(self, f"{side}_sum").cpu(),
            getattr(self, f"{side}_products").cpu(),
            self.grid_bits,
        )


class FeatureSums(FeatureSumMetric):
    """The statistics of one set of images, over any number of ranks.

    Args:
        num_features: Width of the features, d.
        num_samples: Ids of samples are below it.
        grid_bits: Features are rounded to multiples of ``2**-grid_bits``.
        settings: Those of ``torchmetrics.Metric``.
    """

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        *,
        grid_bits: int = FEATURE_BITS,
        **settings: Any,
    ) -> None:
        super().__init__(num_features, grid_bits=grid_bits, **settings)
        self.add_side("sample", num_samples)

    @override
    def update(self, features: Tensor, sample_ids: Tensor, counted: Tensor) -> None:
        """Add features ``(B, d)`` of samples with ids int64 ``(B,)`` where ``counted`` ``(B,)``.

        Raises:
            DataError: See ``take``.
        """
        self.take("sample", features, sample_ids, counted)

    @override
    def compute(self) -> FeatureStatistics:
        """Return the statistics."""
        return self.side_statistics("sample")
