"""Means of rewards: what is left out, and a common direction that holds still meanwhile."""

import math

import pytest
import torch
from toy_evaluation import rows_of, setting_of
from toy_scorer import toy_caption, toy_scorer

from segalign.evaluation.image_metric import ImageBatch
from segalign.metrics.fixed_directions import clip_rewards, held_directions
from segalign.metrics.reward_means import RewardMetric
from segalign.metrics.reward_protocol import reward_protocol
from segalign.rewards.batch_directions import BatchDirection, EmaDirection
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.rewards.scoring import score_images


def pixels_of(shades: list[int]) -> torch.Tensor:
    return torch.tensor(shades, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def batch_of(places, counted, pixels, rows):
    return ImageBatch(torch.tensor(places), torch.tensor(counted), rows, pixels)


def test_means_leave_out_what_does_not_count_and_what_has_no_score():
    def score(images, captions, valid=None):
        shades = images[:, 0, 0, 0] * 255
        assert captions == ["caption 0", "caption 1", "caption 2"]
        return {"reward": shades, "held_out/dark": torch.where(shades > 5, torch.nan, -shades)}

    metric = RewardMetric(score, {})
    metric.start(setting_of(3))
    metric.update(batch_of([0, 1, 2], [True, True, False], pixels_of([4, 8, 99]), rows_of(3)))
    findings = metric.finish()
    assert findings.values == {"monitor/reward": 6.0, "monitor/held_out/dark": -4.0}
    assert findings.per_image["monitor/reward"] == [4.0, 8.0, None]
    assert findings.protocol == {"metric": "rewards", "rewards": {}}
    dark = findings.per_image["monitor/held_out/dark"]
    assert dark[0] == -4.0
    assert math.isnan(dark[1])
    assert dark[2] is None


def settings_with_captions():
    rows = [{"sample_id": i, "caption": toy_caption(i), "metadata": {}} for i in range(4)]
    return setting_of(4, batch_size=2, rows=rows)


def measure(reward, parts):
    """Score four images in micro-batches of the given sizes."""
    metric = RewardMetric(
        lambda images, captions, valid: score_images({"reward": reward}, images, captions, valid),
        {"reward": reward},
    )
    setting = settings_with_captions()
    metric.start(setting)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 3, 16, 16), generator=draw, dtype=torch.uint8)
    for places in parts:
        rows = [setting.rows[place] for place in places]
        metric.update(batch_of(places, [True] * len(places), pixels[places], rows))
    return metric.finish()


@pytest.mark.parametrize("estimate", [EmaDirection, BatchDirection])
def test_scores_do_not_depend_on_the_batch_or_on_what_training_has_averaged(estimate):
    direction = estimate()
    reward = ClipReward(toy_scorer()._parts, common_direction=direction, omega=0.3).eval()
    first = measure(reward, [[0, 1], [2, 3]])
    if isinstance(direction, EmaDirection):
        assert not len(direction.mean)
        direction.train()(torch.randn(3, 12, generator=torch.Generator().manual_seed(1)))
        direction.eval()
    second = measure(reward, [[3, 0], [1, 2]])
    assert reward.common_direction is direction
    for name, scores in first.per_image.items():
        assert second.per_image[name] == pytest.approx(scores, abs=1e-6), name
    assert first.values["monitor/reward"] != first.values["monitor/reward/text_relevant"]
    # The plain score is that of a reward without reweighting, which stays without.
    plain = measure(ClipReward(toy_scorer()._parts), [[0, 1, 2, 3]]).values
    assert plain.keys() == {"monitor/reward"}
    parts = ("monitor/reward/text_relevant", "monitor/reward/text_irrelevant")
    assert sum(first.values[name] for name in parts) == pytest.approx(
        plain["monitor/reward"], abs=1e-6
    )


def test_the_estimate_returns_after_an_error():
    direction = EmaDirection()
    reward = ClipReward(toy_scorer()._parts, common_direction=direction, omega=0.3)

    def fail(images, captions, valid):
        raise RuntimeError("no score")

    metric = RewardMetric(fail, {"reward": reward})
    setting = settings_with_captions()
    metric.start(setting)
    with pytest.raises(RuntimeError, match="no score"):
        metric.update(batch_of([0], [True], pixels_of([1]), setting.rows[:1]))
    assert reward.common_direction is direction
    assert dict(reward.named_modules())["common_direction"] is direction


def test_rewards_are_found_in_mixtures():
    one, two = (ClipReward(toy_scorer()._parts) for _ in range(2))
    mixture = RewardMixture(
        {"text": WeightedReward(reward=one), "none": WeightedReward(reward=lambda i, c: i.sum())}
    )
    found = clip_rewards({"reward": mixture, "held_out/x": two, "held_out/y": lambda i, c: i})
    assert found == {"reward.networks.text": one, "held_out/x": two}


def test_a_direction_that_is_held_is_told_by_its_values():
    reward = ClipReward(toy_scorer()._parts, common_direction=EmaDirection(), omega=0.3).eval()
    one, other = (torch.eye(12, dtype=torch.float64)[number] for number in (0, 1))
    told = []
    for direction in (one, other, one.clone()):
        with held_directions({reward: direction}):
            told.append(reward_protocol(reward)["common_direction"])
    assert told[0] == told[2] != told[1]
