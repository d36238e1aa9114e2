"""Rows wait for others before they are multiplied, and nothing shows it."""

import pickle

import pytest
import torch
from toy_features import toy_features

from segalign.errors import DataError
from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.feature_sums import FeatureSums

WIDTH, COUNT = 6, 700
FEATURES = toy_features(COUNT, WIDTH)


def add(metric, first, last, step=8):
    for ids in torch.arange(first, last).split(step):
        metric.update(FEATURES[ids], ids, ids >= 0)
    return metric


def fresh(**settings) -> FeatureSums:
    return FeatureSums(WIDTH, COUNT, **settings)


def check(metric, first, last):
    found, expected = metric.compute(), FeatureStatistics.of(FEATURES[first:last])
    wrong = [n for n, one in expected.tensors().items() if not torch.equal(found.tensors()[n], one)]
    assert not wrong


def test_few_rows_are_not_multiplied():
    metric, seen = fresh(), set()
    for number in range(0, 600, 8):
        add(metric, number, number + 8)
        seen.add(metric.sample_products.sum().item())
    assert len(seen) == 1 + 2  # nothing, 256 rows, 512 rows
    check(metric, 0, 600)


def test_sums_are_those_of_all_rows_whenever_they_are_asked_for():
    metric = fresh()
    for number in range(0, 600, 20):
        check(add(metric, number, number + 20), 0, number + 20)


@pytest.mark.parametrize("copied", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_alone(copied):
    metric = add(fresh(), 0, 30)
    copy = copied(metric)
    add(metric, 30, 50)
    add(copy, 30, 40)
    check(metric, 0, 50)
    check(copy, 0, 40)


def test_a_reset_forgets_rows_that_wait():
    metric = add(fresh(), 0, 30)
    metric.reset()
    check(add(metric, 30, 60), 30, 60)


def test_forward_keeps_rows_that_wait():
    metric = add(fresh(), 0, 30)
    ids = torch.arange(30, 50)
    assert metric(FEATURES[ids], ids, ids >= 0).num_samples == 20
    check(metric, 0, 50)


def test_rows_that_wait_are_merged_and_saved():
    first, second = add(fresh(), 0, 30), add(fresh(), 30, 50)
    first.merge_state(second)
    check(first, 0, 50)
    second.persistent(True)
    loaded = fresh()
    loaded.persistent(True)
    loaded.load_state_dict(add(second, 50, 60).state_dict())
    loaded.update(FEATURES[:0], torch.arange(0), torch.ones(0) > 0)
    check(loaded, 30, 60)


def test_rows_that_wait_are_counted_where_sums_become_too_large():
    metric = FeatureSums(1, 10)
    large = torch.full((1, 1), 2.0**14)  # squares of 2^52 on the grid: two are 2^53
    metric.update(large, torch.tensor([0]), torch.tensor([True]))
    with pytest.raises(DataError, match="lower `grid_bits` of the reference statistics"):
        metric.update(large, torch.tensor([1]), torch.tensor([True]))
    assert metric.compute().num_samples == 1
    with pytest.raises(DataError, match="lower `grid_bits`"):
        metric.update(large, torch.tensor([2]), torch.tensor([True]))
