"""Losses on pairs, in closed form."""

import math

import torch

from segalign.losses.pairwise import (
    pairwise_loss,
    pairwise_margin_loss,
    segment_pairwise_loss,
    segment_pairwise_margin_loss,
)

FIRST, SECOND, TIE = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_a_clear_preference_is_a_log_sigmoid():
    losses = pairwise_loss(doubles((3.0, 1.0), (3.0, 1.0)), doubles(FIRST, SECOND))
    expected = doubles(math.log1p(math.exp(-2)), math.log1p(math.exp(2)))
    torch.testing.assert_close(losses, expected)


def test_a_tie_costs_nothing_where_scores_are_equal():
    """Cross-entropy of a tie is at least log 2; PickScore takes that off."""
    losses = pairwise_loss(doubles((1.7, 1.7), (3.0, 1.0)), doubles(TIE, TIE))
    cross_entropy = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    torch.testing.assert_close(losses, doubles(0.0, cross_entropy - math.log(2)))


def test_the_gradient_is_the_difference_of_probabilities():
    logits = doubles((0.3, -0.4), (2.0, 1.0)).requires_grad_(True)
    probs = doubles((0.7, 0.3), FIRST)
    pairwise_loss(logits, probs).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - probs)
    assert torch.autograd.gradcheck(lambda x: pairwise_loss(x, probs), logits)


def test_segments_count_within_their_caption():
    logits = doubles((3.0, 1.0), (1.0, 3.0), (0.0, 0.0))
    owner = torch.tensor([0, 2, 0])
    losses = segment_pairwise_loss(logits, owner, doubles(FIRST, FIRST, SECOND))
    won = math.log1p(math.exp(-2))
    torch.testing.assert_close(losses, doubles((won + math.log(2)) / 2, 0.0, won))


def test_one_segment_is_the_whole_caption():
    logits, probs = doubles((0.3, -0.4), (2.0, 1.0)), doubles(FIRST, TIE)
    torch.testing.assert_close(
        segment_pairwise_loss(logits, torch.arange(2), probs), pairwise_loss(logits, probs)
    )


def test_the_margin_stops_and_ties_do_not_count():
    scores = doubles((0.5, 0.1), (0.5, 0.1), (0.5, 0.4), (0.9, 0.1))
    losses = pairwise_margin_loss(scores, doubles(FIRST, SECOND, (0.75, 0.25), TIE), margin=0.2)
    torch.testing.assert_close(losses, doubles(0.0, 0.6, 0.05, 0.0))


def test_margins_of_segments_average_over_their_caption():
    """Unlike the margin of a mean, segments that pass it do not make up for others."""
    scores = doubles((0.5, 0.1), (0.1, 0.2), (0.4, 0.3), (0.0, 0.9)).requires_grad_(True)
    owner, probs = torch.tensor([0, 2, 0, 0]), doubles(FIRST, FIRST, (0.25, 0.75))
    losses = segment_pairwise_margin_loss(scores, owner, probs, margin=0.2)
    torch.testing.assert_close(losses, doubles(*[(0.0 + 0.1 + 1.1) / 3, 0.0, 0.5 * 0.1]))
    losses.sum().backward()
    third = 1 / 3
    expected = doubles((0.0, 0.0), (0.5, -0.5), (-third, third), (-third, third))
    torch.testing.assert_close(scores.grad, expected)
