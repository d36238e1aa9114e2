"""Image metrics against closed forms and against torch-fidelity and torchmetrics."""

import numpy as np
import pytest
import torch
from torch_fidelity import metric_fid, metric_isc, metric_kid
from torchmetrics.image import inception, kid
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore
from toy_features import on_grid, toy_features, toy_logits

from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.frechet import frechet_distance
from segalign.metrics.frechet_distance import FrechetDistance
from segalign.metrics.inception_score import InceptionScore, split_of
from segalign.metrics.kernels import GaussianKernel, PolynomialKernel, squared_distance

pytestmark = pytest.mark.numerics

WIDTH = 48
PARITY = {"rtol": 1e-9, "atol": 0}


def fitted(features):
    statistics = FeatureStatistics.of(features)
    return statistics.mean(), statistics.covariance()


def distance_of(real, made):
    return frechet_distance(*fitted(real), *fitted(made))


def fidelity_distance(real, made):
    statistics = (metric_fid.fid_features_to_statistics(one) for one in (real, made))
    found = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    return torch.tensor(found[metric_fid.KEY_METRIC_FID], dtype=torch.float64)


class Flat(torch.nn.Module):
    """Takes pixels as features."""

    num_features = WIDTH

    def forward(self, pixels):
        return pixels.flatten(1)


def torchmetrics_fid(**settings):
    # 3 x 4 x 4 "images" of any values
    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 4, 4), **settings)
    return metric.set_dtype(torch.float64)


def as_images(features):
    return features.view(-1, 3, 4, 4)


# ---- Frechet distance: closed forms -------------------------------------------------------------


def test_known_gaussians_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator).double()).Q
    first, second = torch.rand(2, 40, generator=generator).double() * 3 + 0.01
    shift = torch.randn(40, generator=generator).double()
    one, other = (basis * first @ basis.T, basis * second @ basis.T)
    exact = shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    found = frechet_distance(shift, one, torch.zeros(40), other)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)  # the jitter alone makes 1e-12


def test_covariances_that_do_not_commute_in_closed_form():
    # S2 = T S1 T with T > 0 is the optimal map's image of S1: tr (S1 S2)^(1/2) = tr S1 T.
    generator = torch.Generator().manual_seed(1)
    first, root = torch.randn(2, 30, 45, generator=generator).double()
    first, transport = first @ first.T / 45, root @ root.T / 45
    second = transport @ first @ transport
    exact = first.trace() + second.trace() - 2 * (first @ transport).trace()
    found = frechet_distance(torch.zeros(30), first, torch.zeros(30), second)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("num_real", "num_made"), [(10, 12), (10, 400), (400, 12)])
def test_singular_covariances_against_the_nuclear_norm(num_real, num_made):
    real = on_grid(toy_features(num_real, 64))
    made = on_grid(toy_features(num_made, 64, 1, 0.2))
    centred = [rows - rows.mean(dim=0) for rows in (real, made)]
    cross = centred[0] @ centred[1].T
    overlap = torch.linalg.matrix_norm(cross, "nuc") / ((num_real - 1) * (num_made - 1)) ** 0.5
    exact = (real.mean(dim=0) - made.mean(dim=0)).square().sum() - 2 * overlap
    for rows in centred:
        exact = exact + rows.square().sum() / (len(rows) - 1)
    torch.testing.assert_close(distance_of(real, made), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [20, 65, 1000])
def test_a_set_has_no_distance_from_itself(count):
    features = toy_features(count, 64)
    assert abs(distance_of(features, features)) <= 1e-5


# ---- Frechet distance: other libraries ----------------------------------------------------------


def test_parity_on_the_grid():
    real, made = on_grid(toy_features(300, WIDTH)), on_grid(toy_features(200, WIDTH, 1, 0.2))
    metric = FrechetDistance(WIDTH, 200, real=FeatureStatistics.of(real))
    for part in torch.arange(200).split(33):
        metric.update(made[part], part, part >= 0)
    found = metric.compute()
    torch.testing.assert_close(found, fidelity_distance(real, made), **PARITY)
    other = torchmetrics_fid()
    other.update(as_images(real), real=True)
    other.update(as_images(made), real=False)
    torch.testing.assert_close(found, other.compute(), **PARITY)


def test_the_grid_itself_hardly_moves_the_distance():
    shifts = {12: 0.0, 6: 0.0}
    for seed in range(0, 8, 2):
        real = toy_features(3000, WIDTH, seed).double()
        made = toy_features(3000, WIDTH, seed + 1, 0.2).double()
        exact = fidelity_distance(real, made)
        for bits in shifts:
            one, other = (FeatureStatistics.of(rows, bits) for rows in (real, made))
            found = frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance())
            shifts[bits] = max(shifts[bits], float(abs(found - exact)))
    assert 0 < shifts[12] <= 1e-5
    assert shifts[6] > 10 * shifts[12]


def test_float32_sums_are_off_where_whole_numbers_are_not():
    real, made = (
        on_grid(toy_features(3000, WIDTH, seed, 30 + seed / 5)).float() for seed in (0, 1)
    )
    exact = fidelity_distance(real.double(), made.double())

    def by_float32(rows):
        mean, second = rows.sum(dim=0) / len(rows), rows.T @ rows / (len(rows) - 1)
        return mean, second - torch.outer(mean, mean) * len(rows) / (len(rows) - 1)

    assert abs(distance_of(real, made) - exact) < 1e-9
    assert abs(frechet_distance(*by_float32(real), *by_float32(made)) - exact) > 1e-5


def test_torchmetrics_forward_doubles_the_real_statistics_and_ours_does_not():
    real, made = on_grid(toy_features(64, WIDTH)), on_grid(toy_features(100, WIDTH, 1))
    other = torchmetrics_fid(reset_real_features=False)
    other.update(as_images(real), real=True)
    for part in as_images(made).split(25):
        other(part, real=False)
    assert other.real_features_num_samples == 1024  # of 64
    ours = FrechetDistance(WIDTH, 100, real=64, allow_few_samples=True)
    ours.update(real, torch.arange(64), torch.ones(64) > 0, real=True)
    for part in torch.arange(100).split(25):
        ours.update(made[part], part, part >= 0)
    ours.compute()
    assert ours.num_real == 64
    own = FrechetDistance(WIDTH, 100, real=FeatureStatistics.of(real), allow_few_samples=True)
    for part in torch.arange(100).split(25):
        own(made[part], part, part >= 0)
    assert torch.equal(own.compute(), ours.compute())
    assert own.num_real == 64


# ---- Inception score ----------------------------------------------------------------------------


def same_splits(classes=30, per_split=20):
    """Logits of ten equal splits, in the order of splits, and ids that fall into them."""
    ids = sorted(range(600), key=lambda number: (split_of(number, 10), number))
    owners = [split_of(number, 10) for number in ids]
    firsts = [owners.index(split) for split in range(10)]
    chosen = torch.tensor([ids[at + step] for at in firsts for step in range(per_split)])
    return toy_logits(len(chosen), classes), chosen


@pytest.mark.parametrize("classes", [30, 1008])
def test_inception_score_of_the_same_splits(classes, monkeypatch):
    logits, ids = same_splits(classes)
    metrics = [InceptionScore(classes, 600, ddof=ddof) for ddof in (0, 1)]
    for metric in metrics:
        metric.update(logits, ids, ids >= 0)
    found, wide = (metric.compute() for metric in metrics)
    expected = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    for name, key in (
        ("mean", metric_isc.KEY_METRIC_ISC_MEAN),
        ("std", metric_isc.KEY_METRIC_ISC_STD),
    ):
        assert float(found[name]) == pytest.approx(expected[key], rel=1e-9, abs=0)
    monkeypatch.setattr(inception.torch, "randperm", torch.arange)
    other = TorchmetricsInceptionScore(feature=Flat())
    other.features = [logits.double()]
    mean, std = other.compute()
    torch.testing.assert_close(wide["mean"], mean, **PARITY)
    torch.testing.assert_close(wide["std"], std, **PARITY)


def test_torchmetrics_inception_score_draws_from_the_global_generator():
    logits, _ = same_splits()
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        other = TorchmetricsInceptionScore(feature=Flat())
        other.features = [logits]
        found.append(other.compute()[0])
        assert not torch.equal(torch.get_rng_state(), before)
    assert found[0] != found[1]  # as two ranks with the same data would find


def test_inception_score_is_nan_in_float32_where_ours_is_not():
    logits = toy_logits(50, 1008, spread=200.0)
    other = TorchmetricsInceptionScore(feature=Flat(), splits=1)
    other.features = [logits]
    ours = InceptionScore(1008, 50, num_splits=1)
    ours.update(logits, torch.arange(50), torch.ones(50) > 0)
    assert torch.isnan(other.compute()[0])
    expected = logits.double().softmax(dim=1)
    marginal = expected.mean(dim=0)
    exact = (
        torch.xlogy(expected, expected).sum(dim=1).mean() - torch.xlogy(marginal, marginal).sum()
    )
    torch.testing.assert_close(ours.compute()["mean"], exact.exp(), **PARITY)


# ---- Kernel distance ----------------------------------------------------------------------------


def test_kernel_distance_of_all_rows():
    real, made = toy_features(100, WIDTH).double(), toy_features(100, WIDTH, 1, 0.2).double()
    found = squared_distance(real, made, PolynomialKernel())
    settings = {
        "kid_kernel": "poly",
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1.0,
    }
    fidelity = metric_kid.kernel_mmd(real.numpy(), made.numpy(), **settings)
    assert float(found) == pytest.approx(fidelity, rel=1e-9, abs=0)
    torch.testing.assert_close(found, kid.poly_mmd(real, made), **PARITY)


def test_kernel_distance_of_unequal_counts():
    real, made = toy_features(70, WIDTH).double(), toy_features(40, WIDTH, 1, 0.2).double()
    cubes = [(one @ two.T / WIDTH + 1) ** 3 for one, two in ((real, real), (made, made))]
    within = sum((cube.sum() - cube.trace()) / (len(cube) * (len(cube) - 1)) for cube in cubes)
    expected = within - 2 * ((real @ made.T / WIDTH + 1) ** 3).mean()
    torch.testing.assert_close(squared_distance(real, made, PolynomialKernel()), expected, **PARITY)


def test_gaussian_kernel_is_that_of_the_published_formulas():
    rows = [torch.nn.functional.normalize(toy_features(80, WIDTH, n).double()) for n in (0, 1)]
    settings = {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": 10.0}
    unbiased = 1000 * metric_kid.kernel_mmd(rows[0].numpy(), rows[1].numpy(), **settings)
    found = squared_distance(3 * rows[0], rows[1] / 7, GaussianKernel())
    # Kernel values of 1 to 1e-16 are subtracted and multiplied by 1000.
    assert float(found) == pytest.approx(unbiased, abs=1e-11)
    gaps = [np.square(torch.cdist(one, two).numpy()) for one in rows for two in rows]
    means = [np.exp(-gap / 200).mean() for gap in gaps]
    biased = 1000 * (means[0] + means[3] - means[1] - means[2])
    found = squared_distance(*rows, GaussianKernel(), "biased")
    assert float(found) == pytest.approx(biased, abs=1e-11)
