"""The mean of values: exact, each sample once, and nothing that is no distance."""

import pytest
import torch

from segalign.errors import DataError
from segalign.metrics.value_mean import ValueMean


def test_the_mean_counts_each_sample_once_in_any_order():
    values = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = ValueMean(60), ValueMean(60)
    ids = torch.arange(50)
    one.update(values, ids, torch.ones(50, dtype=torch.bool))
    for start in range(45, -5, -5):
        rows = torch.cat([ids[start : start + 5].flip(0), ids[:1]])
        other.update(values[rows], rows, torch.arange(6) < 5)  # the last row is padding
        other.update(values[rows], rows, torch.arange(6) < 1)  # and this row comes again
    assert one.compute()["mean"] == other.compute()["mean"]
    assert int(other.compute()["num_samples"]) == 50
    torch.testing.assert_close(one.compute()["mean"], values.mean(), rtol=0, atol=2.0**-40)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 8.5, -8.5])
def test_what_is_no_distance_is_refused_where_it_counts(wrong):
    metric = ValueMean(3)
    values, ids = torch.tensor([1.0, wrong]), torch.arange(2)
    with pytest.raises(DataError, match="expected values of at most 8 in size; got"):
        metric.update(values, ids, torch.tensor([True, True]))
    metric.update(values, ids, torch.tensor([True, False]))
    assert float(metric.compute()["mean"]) == 1


def test_of_nothing_there_is_no_mean():
    metric = ValueMean(3)
    metric.update(torch.ones(2), torch.arange(2), torch.tensor([False, False]))
    result = metric.compute()
    assert result["mean"].isnan()
    assert int(result["num_samples"]) == 0


def test_more_samples_than_can_be_summed_are_refused():
    with pytest.raises(DataError, match="sums of values up to 8"):
        ValueMean(2**20)
