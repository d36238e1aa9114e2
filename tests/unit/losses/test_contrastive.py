"""In-batch contrast against loops over plain lists, and against open_clip's loss."""

import math
from dataclasses import dataclass

import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from segalign.losses.contrastive import OwnedFeatures, contrastive_losses, text_keys

WIDTH, TEMPERATURE = 6, math.log(7.0)
# Texts of each caption: "rain" falls in two, "tree" stands twice in one.
SEGMENTS = [["a fox", "rain"], ["an owl"], ["rain", "a hen", "a hut"], ["tree", "fog", "tree"]]


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator), dim=-1)


@dataclass
class Case:
    """A batch as the loss takes it; features are leaves."""

    words: list[list[str]]
    texts: torch.Tensor
    images: torch.Tensor
    probs: torch.Tensor
    valid: torch.Tensor
    logit_scale: torch.Tensor

    @classmethod
    def draw(cls, words, images_each=1, probs=None, valid=None):
        count = len(words)
        if probs is None:
            probs = torch.full((count * images_each,), 1 / images_each, dtype=torch.float64)
        return cls(
            words,
            unit(sum(map(len, words)), 1).requires_grad_(True),
            unit(count * images_each, 2).requires_grad_(True),
            torch.as_tensor(probs, dtype=torch.float64),
            torch.ones(count) > 0 if valid is None else torch.tensor(valid),
            torch.tensor([TEMPERATURE], dtype=torch.float64, requires_grad=True),
        )

    @property
    def leaves(self):
        return self.texts, self.images, self.logit_scale

    @property
    def text_owner(self):
        return [c for c, words in enumerate(self.words) for _ in words]

    @property
    def image_owner(self):
        each = len(self.images) // len(self.words)
        return [c for c in range(len(self.words)) for _ in range(each)]

    def losses(self, texts=None, images=None, logit_scale=None):
        return contrastive_losses(
            OwnedFeatures(self.texts if texts is None else texts, torch.tensor(self.text_owner)),
            text_keys([word for words in self.words for word in words]),
            OwnedFeatures(
                self.images if images is None else images, torch.tensor(self.image_owner)
            ),
            self.probs,
            self.valid,
            self.logit_scale if logit_scale is None else logit_scale,
        )

    def by_loops(self):
        """The definition read aloud: every list of rivals is collected one by one."""
        words = [word for group in self.words for word in group]
        captions = range(len(self.words))
        scale = self.logit_scale.exp().squeeze()
        losses = []
        for caption in captions:
            terms = [torch.zeros((), dtype=torch.float64)]
            for n, owner in enumerate(self.text_owner):
                if owner != caption or not self.valid[caption]:
                    continue
                for j, shown in enumerate(self.image_owner):
                    if shown != caption:
                        continue
                    images = [
                        image
                        for image, other in zip(self.images, self.image_owner, strict=True)
                        if self.valid[other] and words[n] not in self.words[other]
                    ]
                    texts = [
                        text
                        for text, word, other in zip(
                            self.texts, words, self.text_owner, strict=True
                        )
                        if self.valid[other] and word not in self.words[caption]
                    ]
                    own = scale * self.texts[n] @ self.images[j]
                    to_images = torch.stack([own, *(scale * self.texts[n] @ k for k in images)])
                    to_texts = torch.stack([own, *(scale * m @ self.images[j] for m in texts)])
                    cross_entropies = 2 * own - to_images.logsumexp(0) - to_texts.logsumexp(0)
                    terms.append(-self.probs[j] * cross_entropies / 2 / len(self.words[caption]))
            losses.append(torch.stack(terms).sum())
        return torch.stack(losses)


def distinct(count):
    return [[f"text {number}"] for number in range(count)]


def test_single_texts_and_images_are_clips_own_loss():
    case = Case.draw(distinct(5))
    scale = case.logit_scale.exp()
    expected = ClipLoss()(case.images, case.texts, scale)
    losses = case.losses()
    assert (losses.mean() - expected).abs() <= 1e-12
    logits, own = scale * case.images @ case.texts.T, torch.arange(5)
    rows, columns = (F.cross_entropy(x, own, reduction="none") for x in (logits, logits.T))
    assert (losses - (rows + columns) / 2).abs().max() <= 1e-12


PREFERENCES = [1, 0, 0.5, 0.5, 0.3, 0.7, 0, 1]
CASES = {
    "distinct": {"words": distinct(4)},
    "segments": {"words": SEGMENTS},
    "pairs": {"words": SEGMENTS, "images_each": 2, "probs": PREFERENCES},
    "invalid": {"words": SEGMENTS, "images_each": 2, "valid": [True, False, True, True]},
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_loops(name):
    case = Case.draw(**CASES[name])
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)  # a mistake in one row shows
    losses, expected = case.losses(), case.by_loops()
    assert (losses - expected).abs().max() <= 1e-12
    grads = torch.autograd.grad((weights * losses).sum(), case.leaves)
    wanted = torch.autograd.grad((weights * expected).sum(), case.leaves)
    for grad, other in zip(grads, wanted, strict=True):
        assert (grad - other).abs().max() <= 1e-12
        assert other.abs().max() > 1e-3


def test_the_gradient_is_that_of_finite_differences():
    case = Case.draw(**CASES["pairs"])
    assert torch.autograd.gradcheck(case.losses, case.leaves)


def test_captions_that_hold_the_same_texts_are_no_negatives():
    case = Case.draw([["rain", "fog"], ["fog", "rain", "rain"]], 2)
    losses = case.losses()
    assert losses.tolist() == [0, 0]
    assert all(not grad.any() for grad in torch.autograd.grad(losses.sum(), case.leaves))


def test_a_text_of_two_captions_counts_where_it_is_foreign():
    """Caption 1 does not hold `rain`, so both of them are rivals of its text."""
    case = Case.draw([["rain"], ["sun"], ["rain"]])
    (grad,) = torch.autograd.grad(case.losses()[1], case.texts)
    assert grad[0].any()
    assert grad[2].any()
    (grad,) = torch.autograd.grad(case.losses()[0], case.images)
    assert not grad[2].any()


def test_the_other_image_of_a_pair_is_no_negative():
    case = Case.draw(distinct(2), 2, [1, 0, 1, 0])
    (grad,) = torch.autograd.grad(case.losses()[0], case.images)
    assert not grad[1].any()
    assert grad[0].any()
    assert grad[2].any()  # both images of another caption are
    assert grad[3].any()


def test_the_weight_of_a_pair_moves_between_its_images():
    first = Case.draw(distinct(2), 2, [1, 0, 0.5, 0.5]).losses()[0]
    second = Case.draw(distinct(2), 2, [0, 1, 0.5, 0.5]).losses()[0]
    mixed = Case.draw(distinct(2), 2, [0.3, 0.7, 0.5, 0.5]).losses()[0]
    assert abs(first - second) > 1e-2
    assert (mixed - (0.3 * first + 0.7 * second)).abs() <= 1e-12


def test_invalid_captions_are_as_if_they_were_not_there():
    case = Case.draw(SEGMENTS, valid=[True, True, True, False])
    losses = case.losses()
    assert losses[3] == 0
    few = Case.draw(SEGMENTS[:3])
    alone = few.losses(case.texts[:6], case.images[:3])
    assert (losses[:3] - alone).abs().max() <= 1e-12
    texts, images, _ = torch.autograd.grad(losses.sum(), case.leaves)
    assert not texts[6:].any()
    assert not images[3].any()
    assert texts[:6].any(dim=1).all()


@pytest.mark.parametrize("valid", [[True], [True, False], [False, False]], ids=str)
def test_without_rivals_there_is_nothing_to_learn(valid):
    case = Case.draw(distinct(len(valid)), 2, valid=valid)
    losses = case.losses()
    assert not losses.any()
    assert all(not grad.any() for grad in torch.autograd.grad(losses.sum(), case.leaves))


def test_a_high_temperature_overflows_nothing_in_float32():
    images = torch.eye(2)
    case = Case.draw(distinct(2))
    texts = images.flip(0).requires_grad_(True)
    scale = torch.tensor([math.log(1000.0)])
    losses = case.losses(texts, images, scale)
    torch.testing.assert_close(losses, torch.full((2,), 1000.0))
    losses.sum().backward()
    torch.testing.assert_close(texts.grad, 1000 * (texts.detach() - images))


def test_equal_texts_have_equal_keys_everywhere():
    keys = text_keys(["rain", "fog", "rain", "", "\ud800"])
    assert keys.dtype == torch.int64
    assert keys[0] == keys[2]
    assert len(set(keys.tolist())) == 4
    # blake2b, unlike Python's hash, is the same in every process.
    assert keys[0].item() == -2359044064384054979
