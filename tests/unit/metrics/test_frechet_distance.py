import pickle

import pytest
import torch
from toy_features import toy_features

from segalign.errors import ConfigError, DataError
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.frechet import frechet_distance
from segalign.metrics.frechet_distance import FrechetDistance

WIDTH = 8
REAL, MADE = toy_features(60, WIDTH, 0), toy_features(50, WIDTH, 1, 0.3)


def ids(count):
    return torch.arange(count), torch.ones(count) > 0


def expected(real=REAL, made=MADE):
    one, other = FeatureStatistics.of(real), FeatureStatistics.of(made)
    return frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance())


def test_given_statistics_and_collected_ones_agree():
    given = FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL))
    given.update(MADE, *ids(50))
    collected = FrechetDistance(WIDTH, 50, real=60)
    for part in torch.arange(60).split(7):
        collected.update(REAL[part], part, part >= 0, real=True)
    for part in torch.randperm(50, generator=torch.Generator().manual_seed(0)).split(9):
        collected.update(MADE[part], part, part >= 0)
    assert torch.equal(given.compute(), expected())
    assert torch.equal(collected.compute(), expected())
    assert given.compute().dtype == torch.float64
    assert (collected.num_real, collected.num_generated) == (60, 50)


def test_padding_and_samples_that_come_twice_change_nothing():
    metric = FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL))
    metric.update(MADE, *ids(50))
    metric.update(MADE[:9] * torch.nan, torch.arange(9), torch.zeros(9) > 0)
    metric.update(MADE[:9] + 1, torch.arange(9), torch.ones(9) > 0)
    assert torch.equal(metric.compute(), expected())


def test_forward_doubles_nothing():
    metric = FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL))
    for part in torch.arange(50).split(25):
        value = metric(MADE[part], part, part >= 0)
        assert torch.equal(value, expected(made=MADE[part]))
    assert torch.equal(metric.compute(), expected())
    assert metric.reference.num_samples == 60


def test_a_copy_and_a_reset_keep_the_statistics():
    metric = FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL))
    metric.update(MADE[:5], *ids(5))
    copy = pickle.loads(pickle.dumps(metric))
    copy.update(MADE[5:], torch.arange(5, 50), torch.ones(45) > 0)
    assert torch.equal(copy.compute(), expected())
    metric.reset()
    metric.update(MADE, *ids(50))
    assert torch.equal(metric.compute(), expected())


def test_too_few_samples_are_refused_until_there_are_enough_or_it_is_allowed():
    settings = {"real": FeatureStatistics.of(REAL)}
    metric = FrechetDistance(WIDTH, 50, **settings)
    metric.update(MADE[:8], *ids(8))
    with pytest.raises(DataError, match=r"more generated images than features \(8\).*; got 8;"):
        metric.compute()
    metric.update(MADE, *ids(50))
    assert torch.equal(metric.compute(), expected())
    allowing = FrechetDistance(WIDTH, 50, **settings, allow_few_samples=True)
    allowing.update(MADE[:8], *ids(8))
    assert torch.equal(allowing.compute(), expected(made=MADE[:8]))
    few = FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL[:4]))
    few.update(MADE, *ids(50))
    with pytest.raises(DataError, match="more real images"):
        few.compute()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"8 features on a grid of 2\^-12; got 8 on 2\^-10"):
        FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL, grid_bits=10))
    metric = FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL))
    with pytest.raises(DataError, match="statistics of the real ones are given"):
        metric.update(MADE, *ids(50), real=True)


def test_nan_features_are_refused_unless_they_are_padding():
    metric = FrechetDistance(WIDTH, 50, real=FeatureStatistics.of(REAL))
    with pytest.raises(DataError, match="NaN or infinity in 50 of 50 rows"):
        metric.update(MADE * torch.nan, *ids(50))
