"""Numbers rounded to a grid, so that their sums are exact: the same bits in any order.

Dims: B rows, d features.

Two grids are used. Features become whole numbers in float64, because their products are summed by a
matrix product; float64 adds whole numbers exactly up to 2^53. Bounded values, such as probabilities
and distances, become int64.
"""

from typing import Final

import torch
from torch import Tensor

from segalign.errors import DataError

FEATURE_BITS: Final = 12
VALUE_BITS: Final = 40
# Up to here float64 has every whole number.
MAX_WHOLE: Final = 2.0**53


def to_grid(features: Tensor, grid_bits: int) -> Tensor:
    """Round to multiples of ``2**-grid_bits``, halves to even, as whole numbers in float64."""
    return (features.double() * 2.0**grid_bits).round()


def from_grid(points: Tensor, grid_bits: int) -> Tensor:
    """Undo ``to_grid``, but for its rounding."""
    return points * 2.0**-grid_bits


def check_product_sums(product_sum: Tensor, grid_bits: int) -> None:
    """Check that sums of products of features on the grid, float64 ``(d, d)``, are exact.

    Raises:
        DataError: See ``check_square_sums``.
    """
    check_square_sums(product_sum.diagonal(), grid_bits)


def check_square_sums(square_sum: Tensor, grid_bits: int) -> None:
    """Check that sums of products of features on the grid are exact, by the sums of squares.

    By Cauchy-Schwarz squares bound all other products, and every partial sum of those, in whatever
    order a matrix product adds them. With 12 bits, features below 32 can be summed over 2^19
    images, smaller ones over more.

    Args:
        square_sum: Whole numbers, float64 ``(d,)``.
        grid_bits: The grid.

    Raises:
        DataError: If they are too large.
    """
    largest = square_sum.max().item() if len(square_sum) else 0.0
    if not largest < MAX_WHOLE:
        raise DataError(
            "expected features that can be summed exactly, squares below 2^53 in all; got "
            f"{largest:.3g} on a grid of 2^-{grid_bits}; lower `grid_bits` of the reference "
            "statistics, or take fewer images"
        )


def to_whole(values: Tensor) -> Tensor:
    """Round to multiples of 2^-40, as int64; below 2^22 in size, and so must be all sums."""
    return (values.double() * 2.0**VALUE_BITS).round().to(torch.int64)


def from_whole(sums: Tensor) -> Tensor:
    """Undo ``to_whole``, in float64."""
    return sums.double() * 2.0**-VALUE_BITS


def check_value_sums(largest: float, count: int) -> None:
    """Check that a sum of values on the grid of 2^-40 fits int64.

    Args:
        largest: Bound of the size of a value.
        count: How many are summed.

    Raises:
        DataError: If it does not.
    """
    if not largest * count < (limit := 2.0 ** (62 - VALUE_BITS)):
        raise DataError(
            f"expected at most {limit / largest:.0f} images, so that sums of values up to "
            f"{largest:.3g} are exact; got {count}; evaluate fewer"
        )
