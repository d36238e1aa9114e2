import pytest
import torch

from segalign.errors import DataError
from segalign.metrics.fixed_point import (
    check_product_sums,
    check_value_sums,
    from_grid,
    from_whole,
    to_grid,
    to_whole,
)


def test_the_grid_is_exact_and_as_fine_as_its_bits():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() * 5
    points = to_grid(values, 12)
    assert torch.equal(points, points.round())
    assert (from_grid(points, 12) - values).abs().max() <= 2**-13
    assert torch.equal(to_grid(from_grid(points, 12), 12), points)


def test_values_are_whole_numbers_of_2_to_the_minus_40():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() - 0.5
    whole = to_whole(values)
    assert whole.dtype == torch.int64
    assert (from_whole(whole) - values).abs().max() <= 2**-41


def test_the_largest_square_decides_whether_products_are_exact():
    fitting = torch.diag(torch.tensor([3.0, 2.0**53 - 1], dtype=torch.float64))
    check_product_sums(fitting, 12)
    with pytest.raises(DataError, match=r"below 2\^53 .* got 9.01e\+15 .* lower `grid_bits`"):
        check_product_sums(fitting + torch.eye(2), 12)
    with pytest.raises(DataError, match="got nan"):
        check_product_sums(fitting * torch.nan, 12)


def test_features_below_32_fit_2_to_the_19_images():
    largest = to_grid(torch.tensor([31.999]), 12)
    check_product_sums((largest**2 * 2**19).reshape(1, 1), 12)


def test_sums_of_values_must_fit_int64():
    check_value_sums(7.0, 2**19)
    with pytest.raises(DataError, match=r"at most 4194304 images, .* got 5000000"):
        check_value_sums(1.0, 5_000_000)
