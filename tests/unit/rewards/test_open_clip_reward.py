"""Rewards of open_clip's models against open_clip's own forward."""

import copy

import open_clip
import pytest
import torch
from torch import nn

from segalign.rewards.clip_reward import ClipReward
from segalign.text.segmenter import SentenceSegmenter

CAPTIONS = ["Two owls &amp; a “fox” < 3 m.", "A red fox sits on a wall. It is night."]


def own_scores(scorer, images, captions):
    """Score as open_clip does: its transform, its tokenizer, its forward."""
    size = scorer.model.visual.image_size
    transform = open_clip.image_transform(size, is_train=False)
    pixels = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        image_features, text_features, _ = scorer.model(pixels, open_clip.tokenize(captions))
    return (image_features * text_features).sum(-1)


def test_scores_are_open_clips(open_clip_model, images):
    ours = ClipReward(open_clip_model)(images, CAPTIONS)
    theirs = own_scores(open_clip_model, images, CAPTIONS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_segments_are_scored_alone_and_averaged(open_clip_model, images):
    reward = ClipReward(open_clip_model, segmenter=SentenceSegmenter())
    scores = reward.segment_scores(images, CAPTIONS)
    assert [len(one) for one in scores] == [1, 2]
    each = own_scores(open_clip_model, images[[1, 1]], reward.split(CAPTIONS[1]))
    torch.testing.assert_close(scores[1], each, rtol=0, atol=1e-5)
    means = torch.stack([one.mean() for one in scores])
    torch.testing.assert_close(reward(images, CAPTIONS), means)


def test_the_gradient_is_exact(open_clip_model):
    open_clip_model.model.double()
    reward = ClipReward(open_clip_model, segmenter=SentenceSegmenter(), crop=20)
    images = torch.rand(1, 3, 22, 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reward(x, CAPTIONS[1:]), images, fast_mode=True, atol=1e-7
    )


def test_statistics_of_batches_stay(make_open_clip, images):
    scorer = make_open_clip("resnet")
    reward = ClipReward(scorer)
    nn.ModuleList([reward]).train()
    before = copy.deepcopy(scorer.model.state_dict())
    reward(images, CAPTIONS)
    after = scorer.model.state_dict()
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_share_nothing(any_scorer, images):
    reward = ClipReward(any_scorer)
    expected = reward(images, CAPTIONS)
    other = copy.deepcopy(reward)
    with torch.no_grad():
        for weight in reward.scorer.model.parameters():
            weight.mul_(2)
    torch.testing.assert_close(other(images, CAPTIONS), expected)


def test_the_mask_of_the_text_tower_follows_the_weights(make_open_clip):
    # It is a buffer that a move of the model does not reach; a cast stands for the move to a GPU.
    scorer = ClipReward(make_open_clip()).scorer.double()
    masks = []
    scorer.tower.text_model.transformer.register_forward_pre_hook(
        lambda _module, _inputs, named: masks.append(named["attn_mask"]), with_kwargs=True
    )
    scorer.text_features(["an owl"])
    assert masks[0].dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casts_reach_both_towers(any_scorer, images, dtype):
    reward = ClipReward(any_scorer)
    expected = reward(images, CAPTIONS)
    reward.to(dtype)
    scores = reward(images, CAPTIONS)
    assert scores.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    # bfloat16 keeps 8 bits; scores of these models lie within 1.
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(scores.float(), expected, rtol=0, atol=tolerance)
