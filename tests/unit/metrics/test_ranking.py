"""Ranks against brute force, and their rules for ties and equal captions."""

import pytest
import torch
from torch.nn import functional as F

from segalign.metrics import ranking
from segalign.metrics.ranking import from_fixed_point, gallery_ranks, to_fixed_point


def unit(*shape, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return to_fixed_point(F.normalize(drawn, dim=-1))


def brute_force(images, texts, keys):
    scores = (texts @ images.T).tolist()
    keys = keys.tolist()
    text_ranks, image_ranks = [], []
    for row, key in enumerate(keys):
        best = max(score for score, other in zip(scores[row], keys, strict=True) if other == key)
        wrong = [s for s, other in zip(scores[row], keys, strict=True) if other != key]
        text_ranks.append(sum(score >= best for score in wrong))
        column = {other: scores[number][row] for number, other in enumerate(keys)}
        image_ranks.append(sum(s >= column[key] for other, s in column.items() if other != key))
    return torch.tensor(text_ranks), torch.tensor(image_ranks)


@pytest.mark.parametrize("num_captions", [40, 11])
def test_ranks_are_those_of_brute_force(num_captions):
    keys = torch.arange(40) % num_captions * 7 - 3
    images, texts = unit(40, 6), unit(40, 6, seed=1)[torch.arange(40) % num_captions]
    for found, expected in zip(
        gallery_ranks(images, texts, keys), brute_force(images, texts, keys), strict=True
    ):
        assert torch.equal(found, expected)
        assert 0 < found.float().mean() < num_captions - 1


def test_matching_features_come_first():
    features = unit(30, 8)
    for ranks in gallery_ranks(features, features, torch.arange(30)):
        assert not ranks.any()


def test_a_tie_is_lost():
    same = unit(1, 8).expand(5, 8)
    for ranks in gallery_ranks(same, same, torch.arange(5)):
        assert ranks.tolist() == [4] * 5


def test_equal_captions_answer_for_each_other():
    # Captions 0 and 1 are equal; image 1 fits them, image 0 does not.
    basis = to_fixed_point(torch.eye(3))
    images, texts = basis[[2, 0, 1]], basis[[0, 0, 1]]
    text_ranks, image_ranks = gallery_ranks(images, texts, torch.tensor([5, 5, 9]))
    assert text_ranks.tolist() == [0, 0, 0]
    # Image 0 fits neither of the two distinct captions: it ties with the wrong one.
    assert image_ranks.tolist() == [1, 0, 0]


def test_blocks_and_order_change_nothing(monkeypatch):
    images, texts, keys = unit(30, 900), unit(30, 900, seed=1), torch.arange(30) // 2
    texts = texts[keys]
    whole = gallery_ranks(images, texts, keys)
    monkeypatch.setattr(ranking, "_BLOCK", 4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    parts = gallery_ranks(images[order], texts[order], keys[order])
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one[order], other)


def test_scores_are_exact_whatever_the_kernel():
    images, texts = unit(64, 1024), unit(64, 1024, seed=1)
    product = texts @ images.T
    slow = torch.stack([(text * images.flip(-1).flip(-1)).sum(-1) for text in texts])
    assert torch.equal(product, slow)
    assert torch.equal(product, product.round())
    floats = F.normalize(torch.randn(64, 1024), dim=-1)
    assert (from_fixed_point(to_fixed_point(floats)) - floats).abs().max() <= 2**-27
