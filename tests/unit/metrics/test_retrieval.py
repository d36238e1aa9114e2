"""Retrieval against torchmetrics' own recall, closed cases and its rules."""

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.retrieval import RetrievalRecall

from segalign.errors import ConfigError, DataError
from segalign.metrics.retrieval import CUTOFFS, Retrieval, chance_recall


def unit(*shape, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1)


def captions(count):
    return [f"caption {number}" for number in range(count)]


def add(metric, images, texts, rows=None, valid=None):
    rows = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    valid = torch.ones(len(rows), dtype=torch.bool) if valid is None else torch.tensor(valid)
    texts = texts if texts.ndim == 3 else texts.unsqueeze(1)
    names = [f"caption {number}" for number in rows.tolist()]
    metric.update(rows, names, images[rows], texts[rows], valid)


def noisy(count, width=16, noise=0.3, seed=2):
    images = unit(count, width)
    return images, F.normalize(images + noise * torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)  # fmt: skip


def test_recall_is_that_of_torchmetrics():
    images, texts = noisy(40)
    metric = Retrieval(1)
    add(metric, images, texts)
    recall = metric.compute()["recall"][0, 0]
    target = torch.eye(40, dtype=torch.bool).flatten()
    indexes = torch.arange(40).repeat_interleave(40)
    for way, scores in enumerate((texts @ images.T, images @ texts.T)):
        for place, cutoff in enumerate(CUTOFFS):
            theirs = RetrievalRecall(top_k=cutoff)(scores.flatten(), target, indexes=indexes)
            assert recall[way, place].item() == pytest.approx(theirs.item(), abs=1e-6)
    assert 0.1 < recall[0, 0] < 0.9


def test_perfect_features_always_find():
    images = unit(20, 8)
    metric = Retrieval(1)
    add(metric, images, images)
    assert (metric.compute()["recall"][0] == 1).all()


def test_unrelated_features_find_by_chance():
    metric = Retrieval(1, gallery_size=4)
    add(metric, unit(2000, 64), unit(2000, 64, seed=1))
    recall = metric.compute()["recall"]
    # Standard error 0.01; cutoffs beyond the gallery find everything.
    assert (recall[..., 0] - chance_recall(1, 4)).abs().max() < 0.04
    assert (recall[..., 1:] == 1).all()


def test_galleries_are_consecutive_and_full():
    images, texts = noisy(11, noise=0.6)
    metric = Retrieval(1, gallery_size=4)
    add(metric, images, texts, torch.randperm(11, generator=torch.Generator().manual_seed(0)))
    found = metric.compute()
    expected = []
    for start in (0, 4):
        alone = Retrieval(1, common_direction=unit(16))
        add(alone, images[start : start + 4], texts[start : start + 4])
        expected.append(alone.compute()["recall"][0])
    assert torch.equal(found["recall"][0], torch.stack(expected).mean(0))
    sizes = [found[name].item() for name in ("num_samples", "num_left_out", "num_galleries")]
    assert sizes == [8, 3, 2]
    assert found["gallery_size"] == 4


def test_order_and_repeated_samples_change_nothing():
    images, texts = noisy(30)
    once, again = Retrieval(1), Retrieval(1)
    add(once, images, texts)
    for rows in ([29, 3, 7], range(10, 29), [3, 3, 29], range(12), [7]):
        add(again, images, texts, rows)
    for one, other in zip(once.compute().values(), again.compute().values(), strict=True):
        assert torch.equal(one, other)


def test_padded_rows_are_not_ranked():
    images, texts = noisy(10)
    metric, expected = Retrieval(1), Retrieval(1)
    add(expected, images[:8], texts[:8])
    add(metric, images, texts * torch.nan, valid=[False] * 10)
    add(metric, images, texts, valid=[True] * 8 + [False] * 2)
    assert torch.equal(metric.compute()["recall"], expected.compute()["recall"])


def test_multiples_of_the_direction_matter_to_C_alone():
    images, texts = noisy(60)
    common = unit(16, seed=9)
    shares = torch.rand(60, 1, generator=torch.Generator().manual_seed(4)) - 0.5
    both = torch.stack([0.5 * texts, 0.5 * texts + shares * common], dim=1)
    metric = Retrieval(2, common_direction=common)
    add(metric, images, both)
    plain, relevant = metric.compute()["recall"]
    assert torch.equal(relevant[0], relevant[1])
    assert (plain[0] - plain[1]).abs().max() > 0.05


def test_each_reading_has_its_own_direction():
    images, texts = noisy(60)
    both = torch.stack([texts, F.normalize(texts + 2 * unit(16, seed=5), dim=-1)], dim=1)
    metric = Retrieval(2)
    add(metric, images, both)
    found = metric.compute()["recall"][1]
    for reading in range(2):
        alone = Retrieval(
            1, common_direction=F.normalize(both[:, reading].double().mean(0), dim=-1)
        )
        add(alone, images, both[:, reading])
        assert torch.equal(found[reading], alone.compute()["recall"][1, 0])
    # A common offset hides the right image from C, and not from C_perp.
    plain = metric.compute()["recall"][0]
    assert plain[1, 0, 0] + 0.1 < found[1, 0, 0]


def test_the_length_of_a_mean_counts_only_from_image_to_text():
    images, texts = noisy(60)
    scale = torch.linspace(0.2, 1, 60).unsqueeze(-1)
    metric = Retrieval(2, common_direction=unit(16, seed=9))
    add(metric, images, torch.stack([texts, scale * texts], dim=1))
    plain = metric.compute()["recall"][0]
    assert torch.equal(plain[0, 0], plain[1, 0])
    assert plain[1, 1, 0] < plain[0, 1, 0]


def test_equal_captions_count_as_one():
    metric = Retrieval(1, common_direction=unit(8))
    basis = torch.eye(8)
    text = basis[[0, 0, 1]].unsqueeze(1)
    names = ["same", "same", "other"]
    metric.update(torch.arange(3), names, basis[[2, 0, 1]], text, torch.ones(3).bool())
    found = metric.compute()
    assert found["num_captions"] == 2
    assert found["recall"][0, 0, :, 0].tolist() == pytest.approx([1, 2 / 3])


def one_line(metric, match):
    with pytest.raises(DataError, match=match) as caught:
        metric.compute()
    assert "\n" not in str(caught.value)


def test_too_few_samples_for_a_gallery():
    images, texts = noisy(7)
    metric = Retrieval(1, gallery_size=8)
    add(metric, images, texts)
    one_line(metric, r"at least 8 images .* got 7")


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_sample_at_all():
    one_line(Retrieval(1), "at least 2 images .* got 0")


def test_an_id_of_two_captions():
    metric = Retrieval(1)
    images, texts = noisy(4)
    add(metric, images, texts)
    metric.update(torch.tensor([2]), ["another"], images[:1], texts[:1, None], torch.tensor([True]))
    one_line(metric, "2 stands for two captions")


@pytest.mark.parametrize("place", ["image", "text"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.0])
def test_features_must_be_finite_and_short(place, value):
    images, texts = noisy(4)
    (images if place == "image" else texts)[3, 1] = value
    with pytest.raises(DataError, match="those of sample 3 have length"):
        add(Retrieval(1), images, texts)


def test_a_gallery_of_one_is_refused():
    with pytest.raises(ConfigError, match="at least 2; got 1"):
        Retrieval(1, gallery_size=1)


def test_captions_without_a_common_direction():
    metric = Retrieval(1)
    images = torch.stack([unit(8), -unit(8)])
    add(metric, images, images)
    one_line(metric, "cancel out")


def test_batches_without_a_ranked_sample_are_too_few():
    metric = Retrieval(1)
    nothing = torch.zeros(2, dtype=torch.bool)
    features = torch.ones(2, 4)
    metric.update(torch.arange(2), ["a", "b"], features, features[:, None], nothing)
    with pytest.raises(DataError, match=r"^expected at least"):
        metric.compute()
