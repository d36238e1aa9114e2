"""Scores for evaluation: without chance, without gradient, and unharmed by what is not finite."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segalign.errors import DataError
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import BatchDirection, EmaDirection
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.rewards.protocol import set_step, without_chance
from segalign.rewards.scoring import score_images

CAPTIONS = ["A red fox.", "Two owls sit.", "Rain."]


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_an_image_that_is_not_finite_has_no_reward_and_harms_no_other(make_hugging_face, images):
    reward = ClipReward(make_hugging_face(), common_direction=BatchDirection(), omega=0.3)
    rewards = {"reward": reward, "bright": lambda images, captions: images.mean(dim=(1, 2, 3))}
    whole = score_images(rewards, images, CAPTIONS)
    for broken in (torch.nan, torch.inf):
        images[1, 2, 3, 4] = broken
        found = score_images(rewards, images, CAPTIONS)
        assert list(found) == list(whole)
        assert "reward/text_relevant" in found
        for name, values in found.items():
            assert values.isfinite().tolist() == [True, False, True], name
            assert torch.equal(values[[0, 2]], whole[name][[0, 2]]), name


def test_the_network_sees_zeros_in_its_place(images):
    seen = []

    def reward(images, captions):
        seen.append(images)
        return images.mean(dim=(1, 2, 3))

    images[1] = torch.nan
    score_images({"reward": reward}, images, CAPTIONS)
    assert torch.equal(seen[0], torch.stack([images[0], torch.zeros(3, 24, 24), images[2]]))


def test_images_of_another_range_are_refused(images):
    with pytest.raises(DataError, match=r"^expected images in \[0, 1\]"):
        score_images({}, images * 255, CAPTIONS)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_crops_are_of_the_centre_and_the_step_returns(make_hugging_face, images, is_mixed):
    cropped = ClipReward(make_hugging_face(), crop=16)
    reward = RewardMixture({"a": WeightedReward(reward=cropped)}) if is_mixed else cropped
    centre = ClipReward(make_hugging_face())(images[..., 4:20, 4:20], CAPTIONS)
    training = []
    for step in range(4):
        set_step(reward, step)
        training.append(reward(images, CAPTIONS))
        assert torch.equal(score_images({"r": reward}, images, CAPTIONS)["r"], centre)
        assert torch.equal(reward(images, CAPTIONS), training[-1])
    assert not torch.equal(training[0], training[1])


def test_a_reward_without_a_step_or_that_fails_is_left_as_it_was():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.told = []

        def set_step(self, step):
            self.told.append(step)

    reward = Own()
    with pytest.raises(RuntimeError), without_chance(reward):
        raise RuntimeError
    assert reward.told == [None, 0]
    with without_chance(lambda images, captions: images):
        pass


def test_padding_is_not_seen_by_an_estimate_of_the_common_direction(make_hugging_face, images):
    valid = torch.tensor([True, True, False])
    for direction in (BatchDirection(), EmaDirection().eval()):
        reward = ClipReward(make_hugging_face(), common_direction=direction, omega=0.3)
        text = reward.text_features(CAPTIONS)
        for rows, told in (([0, 1], valid), ([0, 1, 2], None)):
            common = F.normalize(text[rows].mean(0), dim=0)
            found = score_images({"r": reward}, images, CAPTIONS, told)["r/common_share"]
            torch.testing.assert_close(found, text @ common)
