"""Estimators of the common direction: what they return, remember, refuse."""

import logging
import re

import pytest
import torch

from segalign.errors import ConfigError, DataError
from segalign.rewards.common_direction import (
    BatchDirection,
    CorpusDirection,
    CorpusMean,
    EmaDirection,
    Provenance,
    ask_direction,
    observe_direction,
    share_statistics,
)
from segalign.rewards.decomposition import reweight, text_relevant, unit_mean

E = 512
FACTS = Provenance(
    model="tiny", model_digest="a" * 32, text="whole", captions_digest="b" * 32,
    num_captions=600,
)  # fmt: skip


def cone(
    count: int, seed: int = 0, share: float = 0.8, width: int = E
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw unit vectors of a fixed share of one direction, and that direction."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, width - 1, generator=generator, dtype=torch.float64)
    own /= own.norm(dim=1, keepdim=True)
    features = torch.cat([torch.full((count, 1), share), (1 - share**2) ** 0.5 * own], dim=1)
    direction = torch.zeros(width, dtype=torch.float64)
    direction[0] = 1
    return features, direction


@pytest.mark.parametrize("omega", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.48, 0.73, 0.9])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16, 48])
def test_own_part_that_survives_a_batch_estimate(batch_size, share, omega):
    """It is 1 - (1 - omega) / B of a sample's text-relevant part; with a fixed V it is all."""
    survivals, kept = [], []
    for seed in range(8):
        features, direction = cone(batch_size, seed, share, width=1024)
        own = text_relevant(features, direction)
        for estimate, ratios in ((BatchDirection()(features), survivals), (direction, kept)):
            edited = reweight(features, estimate, omega)
            ratios.append(((edited * own).sum(1) / (own * own).sum(1)).mean())
    assert abs(torch.stack(survivals).mean() - (1 - (1 - omega) / batch_size)) < 0.01
    torch.testing.assert_close(torch.stack(kept), torch.ones(8, dtype=torch.float64))


def test_a_batch_of_one_is_only_rescaled():
    features, _ = cone(1)
    edited = reweight(features, BatchDirection()(features), 0.3)
    torch.testing.assert_close(edited, 0.3 * features)


def test_small_batches_warn_once(caplog):
    estimate = BatchDirection()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            estimate(cone(63)[0])
    assert [record.args[:2] for record in caplog.records] == [(63, 63)]
    caplog.clear()
    BatchDirection()(cone(64)[0])
    assert not caplog.records


def test_the_corpus_mean_does_not_depend_on_batches():
    features, direction = cone(600)
    whole, parts = CorpusMean(), CorpusMean()
    whole.update(features)
    for batch in features.split(77):
        parts.update(batch)
    torch.testing.assert_close(parts.direction(), whole.direction(), rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.direction(), unit_mean(features.sum(0), 600))
    assert whole.direction() @ direction > 0.999
    assert whole.norm == pytest.approx(features.mean(0).norm().item(), abs=1e-14)
    assert CorpusMean().norm == 0


def test_a_small_corpus_is_refused():
    mean = CorpusMean()
    mean.update(cone(511)[0])
    with pytest.raises(DataError, match=r"at least 512 captions .* got 511"):
        mean.direction()


def test_a_saved_direction_comes_back_with_its_provenance(tmp_path):
    _, direction = cone(1)
    path = tmp_path / "v.safetensors"
    CorpusDirection(direction, FACTS).save(path)
    loaded = CorpusDirection.load(path)
    assert loaded.provenance == FACTS
    assert torch.equal(loaded(cone(3)[0].float()), direction.float())
    assert not list(loaded.state_dict())
    loaded.check_model("a" * 32)


def test_a_direction_of_another_model_is_refused(tmp_path):
    saved = CorpusDirection(cone(1)[1], FACTS)
    with pytest.raises(
        DataError,
        match=r"of this model's text weights \(cccccccccccc\); got one .*direction estimate",
    ):
        saved.check_model("c" * 32)
    with pytest.raises(DataError, match="of width 7, the model's; got 512"):
        saved(torch.zeros(2, 7))


def test_what_is_no_direction_is_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no such file; make it with `python main.py direction estimate`"
    ):
        CorpusDirection.load(tmp_path / "nowhere")
    (tmp_path / "v").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="expected a common direction in"):
        CorpusDirection.load(tmp_path / "v")


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.full((4,), float("nan")), "no unit vector, but shape (4,) of length nan"),
        (torch.full((4,), 1.0), "no unit vector, but shape (4,) of length 2"),
        (torch.full((2, 2), 0.5), "no unit vector, but shape (2, 2)"),
    ],
)
def test_a_file_of_another_tensor_is_refused(tmp_path, tensor, found):
    path = tmp_path / "v.safetensors"
    CorpusDirection(tensor, FACTS).save(path)
    with pytest.raises(DataError, match=re.escape(found)):
        CorpusDirection.load(path)


def test_the_moving_average_learns_in_training_only():
    first, second = cone(32, 1)[0], cone(32, 2, share=0.5)[0].roll(3, dims=1)
    estimate = EmaDirection(decay=0.75)
    assert torch.equal(estimate(first), unit_mean(first.sum(0), 32))
    expected = 0.75 * first.mean(0) + 0.25 * second.mean(0)
    torch.testing.assert_close(estimate(second), expected / expected.norm())
    estimate.eval()
    torch.testing.assert_close(estimate(first), expected / expected.norm())


def test_observing_leaves_the_average_alone():
    """In any mode; before there is an average, V is the batch's own, and is forgotten."""
    first, second = cone(32, 1)[0], cone(32, 2)[0]
    estimate = EmaDirection(decay=0.75)
    assert torch.equal(estimate.observe(first), unit_mean(first.sum(0), 32))
    assert torch.equal(estimate.eval()(second), unit_mean(second.sum(0), 32))
    assert not len(estimate.mean)
    known = estimate.train()(first)
    assert torch.equal(estimate.observe(second), known)
    assert torch.equal(estimate.eval()(second), known)
    expected = 0.75 * first.mean(0) + 0.25 * second.mean(0)
    torch.testing.assert_close(estimate.train()(second), expected / expected.norm())


def test_any_estimate_can_be_observed():
    features, direction = cone(64)
    corpus = CorpusDirection(direction, FACTS)
    for estimate in (corpus, BatchDirection(), EmaDirection(), lambda given: given.mean(0)):
        assert torch.equal(observe_direction(estimate, features), estimate(features))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_directions_exact(cast):
    features = cone(32)[0]
    corpus, moving = CorpusDirection(unit_mean(features.sum(0), 32), FACTS), EmaDirection()
    expected = corpus(features), moving(features)
    holder = torch.nn.ModuleList([corpus, moving]).to(cast)
    assert (corpus.direction.dtype, moving.mean.dtype) == (torch.float32, torch.float64)
    assert torch.equal(corpus(features), expected[0])
    torch.testing.assert_close(moving(features), expected[1], rtol=0, atol=1e-15)
    # They still move.
    assert {tensor.device.type for tensor in holder.to("meta").buffers()} == {"meta"}


def test_an_average_that_was_saved_in_low_precision_goes_on():
    estimate = EmaDirection()
    estimate.load_state_dict({"mean": cone(32)[0].mean(0).bfloat16()})
    assert estimate(cone(32)[0]).dtype == estimate.mean.dtype == torch.float64


def rows(count, *counted):
    return torch.tensor([row in counted for row in range(count)])


@pytest.mark.parametrize("read", [BatchDirection(), EmaDirection(), EmaDirection().observe])
def test_only_captions_that_count_are_seen(read):
    features = cone(6)[0]
    found = read(features, counted=rows(6, 1, 4, 5))
    torch.testing.assert_close(found, unit_mean(features[[1, 4, 5]].sum(0), 3), rtol=0, atol=1e-15)


def test_an_average_learns_nothing_where_nothing_counts():
    features = cone(6)[0]
    estimate = EmaDirection(decay=0.5)
    assert estimate(features, counted=rows(6)).norm() == 1
    assert not len(estimate.mean)
    known = estimate(features[:2], counted=rows(2, 0))
    assert torch.equal(estimate(features, counted=rows(6)), known)
    assert torch.equal(estimate.mean, features[0])
    estimate(features, counted=rows(6, 1))
    torch.testing.assert_close(estimate.mean, features[:2].mean(0))


def test_one_caption_that_counts_is_its_own_direction(caplog):
    """A fault of data is no fault of settings: nothing is refused, and nothing said."""
    features = cone(80)[0]
    estimate = BatchDirection(refuse_single=True)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(estimate(features, counted=rows(80, 3)), features[3])
        assert estimate(features, counted=rows(80)).norm() == 1
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"at least 2 captions in a global batch .* got 1,"):
        estimate(features[:1], counted=rows(1))


def test_any_estimate_is_given_what_counts():
    features, direction = cone(8)
    corpus = CorpusDirection(direction, FACTS)
    counted, given = rows(8, 2, 5), features[[2, 5]]
    for estimate in (corpus, BatchDirection(), EmaDirection(), lambda given: given.mean(0)):
        torch.testing.assert_close(ask_direction(estimate, features, counted), estimate(given))
    assert torch.equal(ask_direction(corpus, features, rows(8)), direction)
    assert torch.equal(ask_direction(torch.nn.Identity(), features), features)


@pytest.mark.parametrize("read", ["forward", "observe"])
def test_a_batch_of_one_is_refused_where_that_is_asked_for(read):
    estimate = BatchDirection(refuse_single=True)
    with pytest.raises(ConfigError, match=r"at least 2 captions in a global batch .* got 1,"):
        getattr(estimate, read)(cone(1)[0])
    getattr(estimate, read)(cone(2)[0])


def test_a_saved_moving_average_goes_on():
    straight, resumed = EmaDirection(), EmaDirection()
    straight(cone(32, 1)[0])
    resumed.load_state_dict(straight.state_dict())
    assert torch.equal(resumed(cone(32, 2)[0]), straight(cone(32, 2)[0]))


def test_share_statistics_are_those_of_the_projections():
    features, direction = cone(1000, share=0.7)
    statistics, shares = share_statistics(features.split(300), direction)
    assert shares.shape == (1000,)
    assert statistics.mean == pytest.approx(0.7)
    assert statistics.std == pytest.approx(0, abs=1e-12)
    assert statistics.low == pytest.approx(0.7)


def test_quantiles_of_shares_are_exact():
    shares = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    features = torch.stack([shares, torch.zeros_like(shares)], dim=1)
    statistics, _ = share_statistics(features.split(10), torch.tensor([1.0, 0.0]))
    assert (statistics.low, statistics.high) == pytest.approx((0.05, 0.95))
    assert statistics.std == pytest.approx(shares.std().item())


def test_a_decay_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match=r"expected `decay` in \[0, 1\); got 1"):
        EmaDirection(1.0)


@pytest.mark.parametrize("counted", [None, torch.tensor([True, True, True, False])])
def test_what_is_not_finite_never_enters_an_estimate(counted):
    rows = torch.eye(4, dtype=torch.float64)
    rows[1, 0], rows[2, 3] = torch.nan, torch.inf
    seen = rows[[0]] if counted is not None else rows[[0, 3]]
    moving = EmaDirection(0.5).train()
    for estimate in (BatchDirection(), moving):
        expected = unit_mean(seen.sum(dim=0), len(seen))
        assert torch.equal(estimate(rows, counted), expected)
    before = moving.mean.clone()
    moving(torch.full((2, 4), torch.nan))
    assert torch.equal(moving.mean, before)
