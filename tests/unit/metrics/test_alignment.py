"""Rewards as metrics of generated images: means, groups, Denscores, and what is refused."""

import dataclasses
import json

import pytest
import torch
from toy_alignment import (
    alignment_setting,
    batches_of,
    brightness,
    measure,
    toy_clip_reward,
    toy_direction,
    toy_pixels,
)

from segalign.errors import ConfigError, DataError
from segalign.metrics.alignment import Alignment
from segalign.metrics.pair_buckets import length_bucket
from segalign.metrics.reward_protocol import reward_protocol
from segalign.rewards.batch_directions import BatchDirection, EmaDirection
from segalign.rewards.common_direction import CorpusDirection
from segalign.rewards.mixture import RewardMixture, WeightedReward
from segalign.rewards.zoo import HuggingFaceClip


@pytest.fixture(scope="module")
def reward():
    return toy_clip_reward()


@pytest.fixture(scope="module")
def found(reward):
    return measure(Alignment({"dense": reward, "bright": brightness}), alignment_setting())


def images_of(setting):
    return torch.stack([toy_pixels(place) for place in range(setting.plan.num_images)]) / 255


def captions_of(setting):
    return [row["caption"] for row in setting.rows for _ in range(setting.plan.images_per_caption)]


def test_every_reward_is_its_own_mean(reward, found):
    setting = alignment_setting()
    images, captions = images_of(setting), captions_of(setting)
    expected = reward(images, captions).double().mean().item()
    assert found.values["reward/dense"] == pytest.approx(expected, rel=1e-5)
    bright = images.double().mean().item()
    assert found.values["reward/bright"] == pytest.approx(bright, rel=1e-6)
    assert len(found.per_image["reward/bright"]) == 18


def test_segments_are_told_apart_and_lie_where_they_stand(reward, found):
    setting = alignment_setting()
    captions = captions_of(setting)
    expected = reward.segment_scores(images_of(setting), captions)
    for scores, spans, own, caption in zip(
        found.per_image["segment_scores/dense"],
        found.per_image["segment_spans/dense"],
        expected,
        captions,
        strict=True,
    ):
        assert scores == pytest.approx(own.tolist(), abs=1e-6)
        assert "".join(caption[start:end] for start, end in spans) == caption
        assert len(scores) == len(spans)


def test_denscores_are_the_formulas(reward, found):
    setting = alignment_setting()
    captions = captions_of(setting)
    image = reward.image_features(images_of(setting)).double()
    text = reward.segment_features(captions).mean().double()
    distinct = [row["caption"] for row in setting.rows]
    mean = reward.segment_features(distinct).mean().double().mean(0)
    direction = mean / mean.norm()
    relevant = text - (text @ direction).unsqueeze(1) * direction
    cosines = torch.nn.functional.cosine_similarity(image, relevant)
    assert found.values["denscore/dense"] == pytest.approx(
        100 * (image * text).sum(1).mean().item(), rel=1e-5
    )
    assert found.values["denscore_o/dense"] == pytest.approx(100 * cosines.mean().item(), rel=1e-4)
    assert "denscore/bright" not in found.values


def test_lengths_are_those_of_clip_tokens(reward, found):
    setting = alignment_setting()
    buckets = [length_bucket(reward.scorer, caption) for caption in captions_of(setting)]
    assert {*buckets} == {"length/1-77", "length/78-154"}
    scores = found.per_image["reward/bright"]
    for bucket in {*buckets}:
        own = [score for score, one in zip(scores, buckets, strict=True) if one == bucket]
        value = found.values[f"reward/bright/{bucket}"]
        assert value == pytest.approx(sum(own) / len(own), rel=1e-12)
    assert "reward/bright/length/over_308" not in found.values


def test_positions_are_averaged_over_segments(found):
    rows = found.per_image["segment_scores/dense"]
    late = [score for scores in rows for score in scores[7:]]
    assert found.values["segment_score/dense/from_8"] == pytest.approx(sum(late) / len(late))
    offsets = [scores[0] - sum(scores) / len(scores) for scores in rows]
    expected = sum(offsets) / len(offsets)
    assert found.values["segment_offset/dense/1"] == pytest.approx(expected)


def test_what_does_not_count_changes_nothing(reward):
    setting = alignment_setting()
    lost = {0, 1, 7}
    found = measure(Alignment({"dense": reward}), setting, lost=lost)
    scores = found.per_image["reward/dense"]
    assert [place for place, score in enumerate(scores) if score is None] == sorted(lost)
    assert {*found.per_image} == {
        "num_tokens", "reward/dense", "segment_scores/dense", "segment_spans/dense",
        "denscore/dense", "denscore_o/dense",
    }  # fmt: skip
    assert all(one[0] is None and one[2] is not None for one in found.per_image.values())
    kept = [score for score in scores if score is not None]
    assert found.values["reward/dense"] == pytest.approx(sum(kept) / 15, rel=1e-12)
    whole = measure(Alignment({"dense": reward}), setting)
    # V is that of all captions, also of those without an image.
    assert found.per_image["denscore_o/dense"][2] == whole.per_image["denscore_o/dense"][2]


def test_a_second_evaluation_starts_anew(reward):
    metric = Alignment({"dense": reward})
    first = measure(metric, alignment_setting(3))
    measure(metric, alignment_setting(2))
    assert measure(metric, alignment_setting(3)) == first


def test_training_gets_the_main_numbers_alone(reward):
    found = measure(Alignment({"dense": reward}), alignment_setting(is_final=False))
    assert {*found.values} == {"reward/dense", "denscore/dense", "denscore_o/dense"}
    assert found.per_image == {}
    assert found.notes == []


def test_a_given_direction_is_used_and_told(reward, tmp_path):
    toy_direction(reward).save(tmp_path / "v.safetensors")
    metric = Alignment({"dense": reward}, {"dense": str(tmp_path / "v.safetensors")})
    setting = alignment_setting(3)
    given = measure(metric, setting)
    of_reward = toy_clip_reward(common_direction=toy_direction(reward))
    own = measure(Alignment({"dense": of_reward}), setting)
    estimated = measure(Alignment({"dense": reward}), setting)
    name = "denscore_o/dense"
    assert given.values[name] == own.values[name] != estimated.values[name]
    sources = [
        one.protocol["rewards"]["dense"]["denscore_o_direction"] for one in (given, own, estimated)
    ]
    assert sources[0] == sources[1]
    assert [one["kind"] for one in sources] == ["corpus", "corpus", "captions of the evaluation"]
    assert "reward/dense/text_relevant" in own.values


def test_a_direction_of_another_scorer_is_refused(reward, tmp_path):
    direction = toy_direction(reward)
    other = dataclasses.replace(direction.provenance, model_digest="0" * 32)
    CorpusDirection(direction.direction, other).save(tmp_path / "v.safetensors")
    metric = Alignment({"dense": reward}, {"dense": str(tmp_path / "v.safetensors")})
    with pytest.raises(DataError, match=r"^expected a common direction of this model's"):
        metric.start(alignment_setting())


def test_one_caption_has_no_text_relevant_part(reward):
    found = measure(Alignment({"dense": reward}), alignment_setting(1))
    assert "denscore/dense" in found.values
    assert "denscore_o/dense" not in found.values
    assert "needs a common direction" in found.notes[0]


def test_a_score_that_is_not_finite_is_left_out_and_told():
    def broken(images, captions):
        return torch.where(images.mean(dim=(1, 2, 3)) > 0.5, torch.nan, 1.0)

    found = measure(Alignment({"broken": broken}), alignment_setting())
    assert found.values["reward/broken"] == 1.0
    assert "scores of `reward/broken` are not finite" in found.notes[0]


@pytest.mark.parametrize("direction", [BatchDirection(), EmaDirection()])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_scores_that_depend_on_the_batch_are_refused(direction, is_mixed):
    reward = toy_clip_reward(common_direction=direction, omega=0.3)
    if is_mixed:
        reward = RewardMixture({"part": WeightedReward(reward=reward)})
    with pytest.raises(ConfigError, match="score each image by itself"):
        Alignment({"dense": reward}).start(alignment_setting())


def test_a_moving_average_that_has_learned_is_taken_as_it_is():
    direction = EmaDirection()
    reward = toy_clip_reward(common_direction=direction, omega=0.3)
    reward.train()
    reward(torch.rand(2, 3, 20, 20), ["A fox.", "An owl."])
    before = direction.mean.clone()
    found = measure(Alignment({"dense": reward}), alignment_setting())
    assert torch.equal(direction.mean, before)
    assert direction.training
    assert "reward/dense/common_share" in found.values


def test_settings_are_read_once_for_all_metrics():
    source = HuggingFaceClip(model="tiny", init="random", text="segments")
    setting = alignment_setting()
    first, second = Alignment({"dense": source}), Alignment({"other": source})
    first.start(setting)
    second.start(setting)
    assert first._rows["dense"].reward is second._rows["other"].reward
    calls = []
    encode = first._rows["dense"]._encode
    batch = next(iter(batches_of(setting)))
    encode.reward.scorer.preprocessing.register_forward_hook(lambda *_: calls.append(1))
    first.update(batch)
    second.update(batch)
    assert len(calls) == 1


def test_rewards_are_left_as_they_were():
    reward = toy_clip_reward(crop=16)
    reward.set_step(7)
    reward.train()
    measure(Alignment({"dense": reward}), alignment_setting())
    assert reward.training
    assert reward.step == 7


def test_numbers_say_what_they_depend_on(reward, found):
    known = reward_protocol(reward)
    assert json.loads(json.dumps(known, allow_nan=False)) == known
    assert known.items() <= found.protocol["rewards"]["dense"].items()
    twin = toy_clip_reward()
    assert reward_protocol(twin) == known
    twin.renormalize = True
    assert reward_protocol(twin) != known
    with torch.no_grad():
        list(twin.scorer.parameters())[-1].mul_(1.5)
    assert reward_protocol(twin)["weights"] != known["weights"]
    mixture = RewardMixture({"a": WeightedReward(reward=brightness, weight=0.5)})
    kind = f"{brightness.__module__}.brightness"
    assert reward_protocol(mixture)["parts"] == {"a": {"weight": 0.5, "kind": kind}}


@pytest.mark.parametrize(
    ("rewards", "directions", "message"),
    [
        ({}, None, "at least one reward"),
        ({"a/b": brightness}, None, "without dots or slashes"),
        ({"a": brightness}, {"b": "v"}, "got one of `b`; known are `a`"),
    ],
)
def test_what_cannot_be_is_refused(rewards, directions, message):
    with pytest.raises(ConfigError, match=message):
        Alignment(rewards, directions)


def test_a_direction_for_a_reward_without_segments_is_refused():
    metric = Alignment({"bright": brightness}, {"bright": "v.safetensors"})
    with pytest.raises(ConfigError, match="which is none"):
        metric.start(alignment_setting())
