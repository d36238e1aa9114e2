import pytest
import torch
from toy_features import toy_features

from segalign.errors import ConfigError, DataError
from segalign.metrics import kernels
from segalign.metrics.kernel_distance import KernelDistance
from segalign.metrics.kernels import GaussianKernel, PolynomialKernel, squared_distance

WIDTH = 6
REAL, MADE = toy_features(40, WIDTH, 0), toy_features(50, WIDTH, 1, 0.3)


def collected(order, size, **settings):
    metric = KernelDistance(WIDTH, real_rows=REAL, **settings)
    for part in order.split(size):
        metric.update(MADE[part], part, part >= 0)
    return metric


@pytest.mark.parametrize("settings", [{}, {"num_subsets": 5, "subset_size": 20}])
def test_order_chunks_and_repetitions_do_not_matter(settings):
    straight = collected(torch.arange(50), 50, **settings)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    turned = collected(torch.cat([order, order[:9]]), 7, **settings)
    turned.update(MADE[:4] * torch.nan, torch.arange(4), torch.zeros(4) > 0)
    expected = straight.compute()
    assert ("std" in expected) == bool(settings)
    assert expected["num_generated"] == 50
    assert all(torch.equal(turned.compute()[name], expected[name]) for name in expected)


def test_real_rows_can_be_collected():
    metric = KernelDistance(WIDTH)
    for part in torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(7):
        metric.update(REAL[part], part, part >= 0, real=True)
    metric.update(MADE, torch.arange(50), torch.ones(50) > 0)
    expected = squared_distance(REAL, MADE, PolynomialKernel())
    assert torch.equal(metric.compute()["distance"], expected)


def test_forward_adds_a_batch_once_and_returns_its_own_distance():
    metric = KernelDistance(WIDTH, real_rows=REAL)
    for part in torch.arange(50).split(25):
        own = squared_distance(REAL, MADE[part], PolynomialKernel())
        assert torch.equal(metric(MADE[part], part, part >= 0)["distance"], own)
    with pytest.raises(DataError, match="at least 2 images"):
        metric(MADE[:1], torch.tensor([0]), torch.ones(1) > 0)
    assert metric.compute()["num_generated"] == 50


@pytest.mark.parametrize("kernel", [PolynomialKernel(), GaussianKernel(sigma=1.0)])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_blocks_do_not_matter_but_for_rounding(kernel, estimator, monkeypatch):
    whole = squared_distance(REAL, MADE, kernel, estimator)
    monkeypatch.setattr(kernels, "_BLOCK", 7)
    parts = squared_distance(REAL, MADE, kernel, estimator)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=0)


def test_subsets_are_drawn_by_seed_and_number_alone():
    settings = {"num_subsets": 4, "subset_size": 30}
    state = torch.get_rng_state()
    found = [collected(torch.arange(50), 50, seed=n, **settings).compute() for n in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0]["distance"], found[1]["distance"])
    assert found[0]["distance"] != found[2]["distance"]
    assert found[0]["std"] > 0


def test_the_unbiased_distance_of_one_distribution_is_around_zero():
    draws = toy_features(2400, WIDTH).split(30)
    found = torch.tensor(
        [
            [squared_distance(*pair, GaussianKernel(), kind) for kind in ("unbiased", "biased")]
            for pair in zip(draws[::2], draws[1::2], strict=True)
        ]
    )
    unbiased, biased = found.mean(dim=0) / (found.std(dim=0) / len(found) ** 0.5)
    assert abs(unbiased) < 3
    assert biased > 5


def test_bad_input_is_refused():
    everything = torch.arange(50), torch.ones(50) > 0
    metric = KernelDistance(WIDTH, real_rows=REAL)
    with pytest.raises(DataError, match="NaN or infinity in 50 of 50"):
        metric.update(MADE * torch.nan, *everything)
    with pytest.raises(DataError, match=r"got shape \(50, 6\), `real` True"):
        metric.update(MADE, *everything, real=True)
    with pytest.raises(DataError, match=r"at least 2 images .* 40 real and 0 generated"):
        metric.compute()
    metric.update(MADE, *everything)
    metric.update(MADE[:1] + 1, torch.tensor([7]), torch.ones(1) > 0)
    with pytest.raises(DataError, match="7 stands for two"):
        metric.compute()
    with pytest.raises(DataError, match="lower `subset_size`"):
        collected(torch.arange(50), 50, num_subsets=2, subset_size=45).compute()
    with pytest.raises(ConfigError, match="expected real rows of 7 features"):
        KernelDistance(7, real_rows=REAL)
