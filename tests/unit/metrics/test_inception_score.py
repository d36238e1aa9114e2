import pytest
import torch
from toy_features import toy_logits

from segalign.errors import DataError
from segalign.metrics.inception_score import InceptionScore, split_of

LOGITS = toy_logits(120, 20)
IDS, ALL = torch.arange(120), torch.ones(120) > 0


def score(logits=LOGITS, ids=IDS, counted=ALL, **settings):
    metric = InceptionScore(logits.shape[1], 120, **settings)
    metric.update(logits, ids, counted)
    return metric.compute()


def test_order_chunks_and_classes_do_not_matter():
    metric = InceptionScore(20, 120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    turned = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    for part in order.split(1):
        metric.update(LOGITS[part][:, turned], IDS[part], ALL[part])
    found, expected = metric.compute(), score()
    torch.testing.assert_close(found["mean"], expected["mean"], rtol=1e-15, atol=0)
    straight = InceptionScore(20, 120)
    for part in order.split(7):
        straight.update(LOGITS[part], IDS[part], ALL[part])
    assert all(torch.equal(straight.compute()[name], expected[name]) for name in expected)


def test_certain_and_even_classes_score_as_many_as_there_are():
    logits = 1000 * torch.eye(5).repeat(24, 1)
    found = score(logits, num_splits=1)
    assert found["mean"] == pytest.approx(5, abs=1e-9)
    assert score(torch.zeros(120, 5), num_splits=1)["mean"] == pytest.approx(1, abs=1e-9)


def test_underflow_is_no_nan():
    found = score(toy_logits(120, 1008, spread=200.0))
    assert torch.isfinite(found["mean"])
    assert torch.isfinite(found["std"])


def test_the_deviation_is_that_of_the_divisor():
    wide, narrow = (score(ddof=ddof)["std"] for ddof in (1, 0))
    torch.testing.assert_close(wide, narrow * (10 / 9) ** 0.5, rtol=1e-12, atol=0)


def test_empty_splits_are_left_out_and_counted():
    few = IDS < 4
    found = score(counted=few)
    owners = {split_of(number, 10) for number in range(4)}
    assert found["num_empty_splits"] == 10 - len(owners) > 0
    assert found["num_samples"] == 4
    assert torch.isfinite(found["mean"])
    with pytest.raises(DataError, match="got none; add images"):
        score(counted=IDS < 0)


def test_splits_are_about_even():
    counts = torch.bincount(torch.tensor([split_of(number, 10) for number in range(5000)]))
    assert 420 < counts.min() <= counts.max() < 580


def test_nan_logits_are_refused_and_random_numbers_left_alone():
    state = torch.get_rng_state()
    score()
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError, match="expected finite features"):
        score(LOGITS * torch.nan)


def test_too_many_images_are_refused_at_once():
    with pytest.raises(DataError, match="got 1000000; evaluate fewer"):
        InceptionScore(1008, 1_000_000)
