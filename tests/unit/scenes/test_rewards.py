"""The scorers of scenes as rewards: of other captions they think less, and both are frozen."""

import pytest
import torch

from segalign.rewards.direction_settings import EmaEstimate
from segalign.scenes.rewards import HeldOutScenesReward, ScenesReward
from segalign.scenes.samples import make_sample


@pytest.fixture(scope="module")
def scenes():
    return [make_sample("3x3", 2**40 + 9, index, length="long") for index in range(12)]


@pytest.mark.parametrize("kind", [ScenesReward, HeldOutScenesReward])
def test_pictures_are_liked_best_with_their_own_captions(kind, scenes):
    reward = kind().load()
    images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) / 255 for scene in scenes])
    captions = [scene.caption for scene in scenes]
    own, other = reward(images, captions), reward(images, captions[1:] + captions[:1])
    assert (own > other).float().mean() >= 0.9
    assert not any(weight.requires_grad for weight in reward.parameters())


def test_settings_of_clip_rewards_are_theirs_too():
    source = ScenesReward(omega=0.3, common_direction=EmaEstimate(), text="segments")
    reward = source.load()
    assert reward.omega == 0.3
    assert reward.common_direction is not None
