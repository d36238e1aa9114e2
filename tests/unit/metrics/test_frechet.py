import pytest
import torch
from toy_features import toy_features

from segalign.errors import DataError
from segalign.metrics import frechet
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.frechet import frechet_distance, trace_of_root


def gaussian(count, width, seed, shift=0.0):
    statistics = FeatureStatistics.of(toy_features(count, width, seed, shift))
    return statistics.mean(), statistics.covariance()


def test_both_orders_give_the_same():
    one, other = gaussian(100, 16, 0), gaussian(90, 16, 1, 0.5)
    there, back = frechet_distance(*one, *other), frechet_distance(*other, *one)
    assert there.dtype == torch.float64
    assert there > 1
    assert torch.equal(there, back)


def test_a_singular_side_is_not_the_one_that_is_factored():
    singular, full = gaussian(9, 16, 0)[1], gaussian(400, 16, 1)[1]
    exact = torch.linalg.eigvals(singular @ full).real.topk(8).values.sqrt().sum()
    for pair in ((singular, full), (full, singular)):
        torch.testing.assert_close(trace_of_root(*pair), exact, rtol=1e-6, atol=0)


def test_the_eigenvectors_help_where_cholesky_fails(monkeypatch):
    one, other = gaussian(100, 16, 0), gaussian(90, 16, 1, 0.5)
    expected = frechet_distance(*one, *other)
    monkeypatch.setattr(frechet, "_cholesky", lambda _: (None, 0.0))
    torch.testing.assert_close(frechet_distance(*one, *other), expected, rtol=1e-11, atol=0)


def test_equal_images_have_no_covariance_and_still_a_distance():
    nothing = torch.zeros(4, 4)
    found = frechet_distance(torch.zeros(4), nothing, torch.ones(4), nothing)
    assert found == 4
    assert frechet_distance(torch.zeros(4), nothing, torch.ones(4), torch.eye(4)) == 8


def test_nothing_is_clamped_at_zero():
    found = torch.stack([frechet_distance(*(one := gaussian(60, 24, n)), *one) for n in range(20)])
    assert found.abs().max() < 1e-9
    assert (found < 0).any()


def test_what_is_no_covariance_is_refused():
    mean, good = torch.zeros(2), torch.eye(2)
    with pytest.raises(DataError, match="without negative eigenvalues; got -1 below"):
        frechet_distance(mean, good, mean, torch.diag(torch.tensor([1.0, -1.0])))
    with pytest.raises(DataError, match="expected finite covariances"):
        frechet_distance(mean, good, mean, good * torch.nan)
