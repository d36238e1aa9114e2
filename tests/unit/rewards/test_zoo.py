"""Named CLIP-type rewards: their defaults, and what their settings come to."""

import pytest
import torch
from jsonargparse import ArgumentParser

from segalign.errors import ConfigError
from segalign.rewards import zoo
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import CorpusDirection, Provenance
from segalign.rewards.direction_checks import describe_text, text_digest
from segalign.rewards.direction_settings import BatchEstimate, CorpusEstimate, EmaEstimate
from segalign.rewards.mixture import Mixture, RewardMixture, WeightedReward
from segalign.rewards.protocol import RewardSource
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.text.segmenter import OfficialSegmenter, SentenceSegmenter
from segalign.text.windows import WindowSegmenter

CAPTIONS = ["A “red” fox sits on a wall. It is 3.5 m high.", "Two owls."]


@pytest.fixture
def folder(tmp_path, make_hugging_face):
    make_hugging_face().model.save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.mark.parametrize(
    ("source", "model", "text", "cleaning"),
    [
        (zoo.ClipH(), "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "whole", "none"),
        (zoo.PickScore(), "yuvalkirstain/PickScore_v1", "whole", "none"),
        (zoo.Denscore(), "luping-liu/Denscore", "segments", "none"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, zoo.ClipSettings) else None,
)
def test_published_scorers_of_hugging_face(monkeypatch, make_hugging_face, source, model, text,
                                           cleaning):  # fmt: skip
    asked = []
    monkeypatch.setattr(
        "segalign.rewards.scorer_source.load_clip_scorer",
        lambda name: asked.append(name) or make_hugging_face(),
    )
    reward = source.load()
    assert asked == [model]
    assert isinstance(reward.scorer.segmenter, SentenceSegmenter) is (text == "segments")
    assert reward.scorer.tower.cleaning == cleaning
    assert (reward.scorer.preprocessing.resize, reward.scorer.preprocessing.crop) == (
        "bicubic",
        None,
    )


@pytest.mark.parametrize(
    ("source", "file"),
    [(zoo.Hpsv2(), "HPS_v2_compressed.pt"), (zoo.Hpsv21(), "HPS_v2.1_compressed.pt")],
    ids=lambda value: type(value).__name__ if isinstance(value, zoo.ClipSettings) else None,
)
def test_hpsv2(monkeypatch, make_open_clip, source, file):
    asked = []
    monkeypatch.setattr(
        zoo,
        "load_open_clip_scorer",
        lambda name, **more: asked.append((name, more)) or make_open_clip(),
    )
    reward = source.load()
    assert asked == [("xswu/HPSv2", {"architecture": "ViT-H-14", "file": file})]
    assert reward.scorer.tower.cleaning == "open_clip"
    assert reward.scorer.preprocessing.settings.fit == "pad"
    assert reward.scorer.segmenter is None


def test_settings_reach_the_reward(folder, images, make_hugging_face):
    source = zoo.HuggingFaceClip(
        model=folder, text="segments", segmenter=OfficialSegmenter(), resize="bilinear", crop=18,
        renormalize=True, cleaning="ftfy", seed=4, common_direction=EmaEstimate(), omega=0.3,
    )  # fmt: skip
    by_hand = ClipReward(
        make_hugging_face(), segmenter=OfficialSegmenter(), resize="bilinear", crop=18,
        renormalize=True, cleaning="ftfy", seed=4, omega=0.3,
        common_direction=EmaEstimate().build(None, num_captions=2),
    )  # fmt: skip
    torch.testing.assert_close(source.load()(images, CAPTIONS), by_hand(images, CAPTIONS))


def test_every_load_makes_a_reward_of_its_own(folder):
    source = zoo.HuggingFaceClip(model=folder)
    rewards = [source.load(), source.load()]
    addresses = [{p.data_ptr() for p in reward.parameters()} for reward in rewards]
    assert not addresses[0] & addresses[1]


def test_low_precision_scores_nearly_the_same(folder, images):
    exact = zoo.HuggingFaceClip(model=folder).load()(images, CAPTIONS)
    reward = zoo.HuggingFaceClip(model=folder, dtype="bfloat16").load()
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    assert reward(images, CAPTIONS).dtype is torch.float32
    # bfloat16 keeps 8 bits of the features.
    torch.testing.assert_close(reward(images, CAPTIONS), exact, rtol=0, atol=0.05)


def test_a_saved_direction_is_used_and_checked(folder, tmp_path, images, make_hugging_face):
    scorer = SegmentScorer(make_hugging_face())
    facts = {"captions_digest": "0", "num_captions": 512, "model": "tiny"}
    provenance = Provenance(
        **facts, model_digest=text_digest(scorer), text=describe_text(scorer.segmenter)
    )
    direction = torch.nn.functional.normalize(torch.ones(12), dim=0)
    CorpusDirection(direction, provenance).save(tmp_path / "v.safetensors")
    estimate = CorpusEstimate(file=str(tmp_path / "v.safetensors"))
    # The weights are those of the estimate before they are rounded.
    source = zoo.HuggingFaceClip(
        model=folder, common_direction=estimate, omega=0.0, dtype="bfloat16"
    )
    reward = source.load()
    parts = reward.score_parts(images, CAPTIONS)
    torch.testing.assert_close(reward(images, CAPTIONS), parts.text_relevant)


def test_a_cast_reward_keeps_its_moving_average(folder, images):
    source = zoo.HuggingFaceClip(model=folder, common_direction=EmaEstimate(), omega=0.3)
    reward = source.load()
    reward(images, CAPTIONS)
    reward.to(torch.bfloat16)
    assert torch.isfinite(reward(images, CAPTIONS)).all()
    assert reward.common_direction.mean.dtype is torch.float64


def test_random_models_of_both_libraries(images, monkeypatch, make_open_clip):
    asked = []
    monkeypatch.setattr(
        zoo, "random_open_clip_scorer", lambda name: asked.append(name) or make_open_clip()
    )
    for kind, name in ((zoo.HuggingFaceClip, "tiny"), (zoo.OpenClip, "ignored")):
        scores = kind(model=name, init="random").load()(images, CAPTIONS)
        assert torch.isfinite(scores).all()
    assert asked == ["ViT-H-14"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"omega": 1.5}, r"`omega` in \[0, 1\]; got 1.5"),
        ({"omega": 0.3}, "a `common_direction` for `omega: 0.3`"),
        ({"segmenter": OfficialSegmenter()}, "`text: segments` for a `segmenter`"),
        ({"crop": 0}, "`crop` of at least 1 pixel"),
        ({"text": "half"}, "`text` to be one of `segments`, `whole`; got `half`"),
        ({"dtype": "int8"}, "`dtype` to be one of"),
        ({"cleaning": "soap"}, "`cleaning` to be one of null, `none`, `ftfy`, `open_clip`"),
        ({"resize": "nearest"}, "`resize` to be one of null, `bicubic`, `bilinear`"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        zoo.ClipH(**settings)


def test_a_batch_of_one_is_refused_where_batches_are_the_estimate():
    source = zoo.HuggingFaceClip(
        model="tiny", init="random", common_direction=BatchEstimate(), omega=0.3
    )
    reward = source.load()
    mixture = RewardMixture({"a": WeightedReward(reward=reward)})
    for one in (reward, mixture):
        with pytest.raises(ConfigError, match="at least 2 captions in a global batch"):
            zoo.check_global_batch(one, 1)
        zoo.check_global_batch(one, 64)
    zoo.check_global_batch(lambda images, captions: images.mean((1, 2, 3)), 1)


def test_a_batch_of_one_is_refused_when_it_is_scored(images):
    source = zoo.HuggingFaceClip(
        model="tiny", init="random", common_direction=BatchEstimate(), omega=0.3
    )
    reward = source.load()
    for score in (reward, RewardMixture({"a": WeightedReward(reward=reward)})):
        with pytest.raises(ConfigError, match="at least 2 captions in a global batch"):
            score(images[:1], CAPTIONS[:1])
        assert score(images, CAPTIONS).shape == (2,)


class Trainer:
    """Stands for a module whose config names a reward.

    Args:
        reward: The reward.
    """

    def __init__(self, reward: RewardSource) -> None:
        self.reward = reward


def test_configs_name_rewards_by_class():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "model")
    denscore = {
        "class_path": "segalign.rewards.zoo.Denscore",
        "init_args": {
            "omega": 0.3,
            "segmenter": {
                "class_path": "segalign.text.windows.WindowSegmenter",
                "init_args": {"num_tokens": 30},
            },
            "common_direction": {
                "class_path": "segalign.rewards.direction_settings.CorpusEstimate",
                "init_args": {"file": "v.safetensors"},
            },
        },
    }
    mixture = {
        "class_path": "segalign.rewards.mixture.Mixture",
        "init_args": {
            "parts": {
                "text": {"reward": denscore},
                "looks": {
                    "reward": {"class_path": "segalign.rewards.aesthetic.Aesthetic"},
                    "weight": 0.1,
                },
                "named": {
                    "reward": {
                        "class_path": "segalign.rewards.registry.NamedReward",
                        "init_args": {"name": "pickscore", "settings": {"crop": 504}},
                    },
                    "weight": -1.0,
                },
            }
        },
    }
    config = parser.parse_object({"model": {"reward": mixture}})
    assert parser.parse_string(parser.dump(config)) == config
    reward = parser.instantiate(config).model.reward
    assert isinstance(reward, Mixture)
    assert reward.parts["looks"].weight == 0.1
    source = reward.parts["text"].reward
    assert isinstance(source, zoo.Denscore)
    assert (source.omega, source.common_direction.file) == (0.3, "v.safetensors")
    assert isinstance(source.segmenter, WindowSegmenter)
