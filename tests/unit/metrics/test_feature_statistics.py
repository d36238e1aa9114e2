import pytest
import torch
from toy_features import on_grid, toy_features

from segalign.errors import DataError
from segalign.metrics.feature_statistics import FeatureStatistics

FEATURES = on_grid(toy_features(200, 12))


def test_mean_and_covariance_are_those_of_the_features():
    statistics = FeatureStatistics.of(FEATURES)
    torch.testing.assert_close(statistics.mean(), FEATURES.mean(dim=0), rtol=1e-14, atol=0)
    expected = torch.cov(FEATURES.T)
    torch.testing.assert_close(statistics.covariance(), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(statistics.covariance(), statistics.covariance().T)


def test_parts_merge_to_the_bits_of_the_whole():
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    empty, *parts = [FeatureStatistics.of(FEATURES[order[at]]) for at in ([], *order.split(33))]
    for part in parts:
        empty = empty.merge(part)
    whole = FeatureStatistics.of(FEATURES)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, empty.tensors()[name])


def test_tensors_bring_it_back():
    tensors = FeatureStatistics.of(FEATURES, grid_bits=9).tensors()
    again = FeatureStatistics.from_tensors({**tensors, "rows": torch.zeros(1)})
    assert (again.num_samples, again.grid_bits, again.num_features) == (200, 9, 12)
    assert all(torch.equal(again.tensors()[name], tensors[name]) for name in tensors)


def test_another_grid_is_refused():
    with pytest.raises(DataError, match=r"\(12, 12\) and \(10, 12\)"):
        FeatureStatistics.of(FEATURES).merge(FeatureStatistics.of(FEATURES, grid_bits=10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_sum": torch.ones(12)}, "`feature_sum` .* got torch.float32"),
        ({"feature_sum": torch.full((12,), 0.5).double()}, "`feature_sum` .* whole numbers"),
        ({"product_sum": torch.ones(12, 3).double()}, r"\(12, 12\); got .*\(12, 3\)"),
    ],
)
def test_foreign_tensors_are_refused(change, message):
    tensors = FeatureStatistics.of(FEATURES).tensors()
    with pytest.raises(DataError, match=message):
        FeatureStatistics.from_tensors({**tensors, **change})
    with pytest.raises(DataError, match="`grid_bits` is missing"):
        FeatureStatistics.from_tensors({"num_samples": torch.ones(1)})


def test_bad_features_are_refused():
    bad = FEATURES.clone()
    bad[[3, 7], 2] = torch.nan
    with pytest.raises(DataError, match="in 2 of 200 rows, first in row 3"):
        FeatureStatistics.of(bad)
    with pytest.raises(DataError, match="lower `grid_bits`"):
        FeatureStatistics.of(FEATURES * 1e6)
    with pytest.raises(DataError, match="at least 2 images; got 1"):
        FeatureStatistics.of(FEATURES[:1]).covariance()
