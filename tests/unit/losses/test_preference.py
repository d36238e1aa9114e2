"""Preference losses by hand-worked algebra."""

import math

import torch

from segalign.losses.preference import dense_segment_loss, edit_contrastive_loss


def test_dense_loss_averages_a_samples_own_questions():
    logits = torch.zeros(2, 3, 4)
    logits[:, 1, 2:] = -torch.inf
    answers = torch.tensor([[0, 1, -1], [-1, -1, -1]])
    losses, right = dense_segment_loss(logits, answers)
    assert torch.allclose(losses, torch.tensor([(math.log(4) + math.log(2)) / 2, 0.0]))
    assert right.tolist() == [[True, False, False], [False, False, False]]


def test_contrastive_loss_in_closed_form():
    images = torch.eye(2)
    negatives = torch.eye(2)[[1, 0]].unsqueeze(1)
    scale = torch.tensor([math.log(3.0)])
    losses = edit_contrastive_loss(images, torch.eye(2), negatives, scale)
    # Each of the three terms sets one match at cosine 1 against one at cosine 0.
    expected = math.log(1 + math.exp(-3.0))
    assert torch.allclose(losses, torch.full((2,), expected))
