"""The mean of bounded values, such as perceptual distances, exact over ranks.

Dims: B rows, N samples there can be.
"""

from typing import Any, Final, TypedDict

from torch import Tensor
from typing_extensions import override

from segalign.errors import DataError
from segalign.metrics.fixed_point import check_value_sums, from_whole, to_whole
from segalign.metrics.sum_metric import SumMetric

_LARGEST: Final = 8.0


class ValueMeanResult(TypedDict):
    """A mean.

    Attributes:
        mean: Mean of the values, float64; NaN of none.
        num_samples: Values counted, int64.
    """

    mean: Tensor
    num_samples: Tensor


class ValueMean(SumMetric):
    """Mean of one value a sample, summed as whole numbers of 2^-40.

    Args:
        num_samples: N; ids of samples are below it.
        settings: Those of ``torchmetrics.Metric``.

    Raises:
        DataError: If there are too many samples for exact sums, about half a million.
    """

    ids: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, num_samples: int, **settings: Any) -> None:
        super().__init__(**settings)
        check_value_sums(_LARGEST, num_samples)
        self.add_ids("ids", num_samples)
        self.add_sum("count")
        self.add_sum("total")

    @override
    def update(self, values: Tensor, sample_ids: Tensor, counted: Tensor) -> None:
        """Add a batch.

        Args:
            values: ``(B,)``, at most 8 in size.
            sample_ids: int64 ``(B,)``.
            counted: Rows to count, bool ``(B,)``.

        Raises:
            DataError: If a counted value is larger or not finite; nothing is changed.
        """
        rows = self.new_rows("ids", sample_ids, counted)
        own = values.detach().cpu().double()[rows]
        if (wrong := own[~(own.abs() <= _LARGEST)]).numel():
            raise DataError(
                f"expected values of at most {_LARGEST:.0f} in size; got {float(wrong[0]):.4g}; "
                "the network's weights are damaged, or are no such network's"
            )
        self.total = self.total + to_whole(own).sum().to(self.total.device)
        self.count = self.count + len(rows)
        self.mark("ids", sample_ids.cpu()[rows])

    @override
    def compute(self) -> ValueMeanResult:
        """Return the mean of all ranks."""
        count = self.count.cpu()
        return {"mean": from_whole(self.total.cpu()) / count, "num_samples": count}
