"""The held-out scorer: what the shipped one knows, and that it is another one than the first."""

import json

import pytest
import torch

from segalign.errors import ConfigError
from segalign.rewards.clip_reward import ClipReward
from segalign.scenes.generated import GeneratedSceneSource
from segalign.scenes.pairs import make_pair
from segalign.scenes.samples import make_sample
from segalign.scenes.scorer_checks import answer_accuracy, as_images, pair_margins
from segalign.scenes.scorers import HeldOutScorer, ScenesScorer
from segalign.scenes.weights import shipped_folder
from segalign.text.segmenter import SentenceSegmenter

STREAM = 78


@pytest.fixture(scope="module")
def reward():
    return ClipReward(HeldOutScorer().load(), segmenter=SentenceSegmenter())


@pytest.fixture(scope="module")
def samples():
    return [make_sample("3x3", STREAM, index) for index in range(8)]


def test_it_answers_one_fact_questions(reward, samples):
    assert answer_accuracy(reward, samples) > 0.9
    assert answer_accuracy(reward, samples, noise=0.15) > 0.85
    assert answer_accuracy(reward, samples[::-1]) == answer_accuracy(reward, samples)


def test_the_answers_are_read_off_the_pictures(reward, samples):
    others = [
        type(sample)(other.image, sample.caption, sample.metadata)
        for sample, other in zip(samples, samples[1:] + samples[:1], strict=True)
    ]
    assert answer_accuracy(reward, others) < 0.6


def test_it_knows_what_the_generator_draws(reward):
    source = GeneratedSceneSource(64, seed=STREAM, share=0.06)
    drawn = [sample for i in range(64) if "drawn" in (sample := source.sample(i)).metadata]
    assert answer_accuracy(reward, drawn) > 0.8


def test_it_ranks_pairs_of_long_captions(reward):
    pairs = [make_pair("3x3", STREAM, index) for index in range(12)]
    margins = pair_margins(reward, pairs)
    assert (margins > 0).float().mean() > 0.8
    swapped = [
        type(pair)(pair.images[::-1], pair.caption, pair.preference_probs[::-1], pair.metadata)
        for pair in pairs
    ]
    torch.testing.assert_close(pair_margins(reward, swapped), margins)


def test_as_a_reward_it_is_frozen_and_gives_gradients_to_images(samples):
    held_out = ClipReward(HeldOutScorer().load(), segmenter=SentenceSegmenter())
    held_out.train()
    before = {name: tensor.clone() for name, tensor in held_out.state_dict().items()}
    captions = [sample.caption for sample in samples]
    images = as_images([sample.image for sample in samples]).requires_grad_()
    scores = held_out(images, captions)
    assert not any(parameter.requires_grad for parameter in held_out.parameters())
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    # An image's score is its own: running statistics, not those of the batch, and they stay.
    torch.testing.assert_close(held_out(images[:1], captions[:1]), scores[:1])
    after = held_out.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_it_is_another_scorer_than_the_first(reward, samples):
    first = ClipReward(ScenesScorer().load())
    ours, theirs = ({type(part).__name__ for part in one.modules()} for one in (reward, first))
    assert "Conv2d" in ours
    assert "ResNetModel" in ours - theirs
    assert {name for name in theirs if "Attention" in name}.isdisjoint(ours)
    images = as_images([sample.image for sample in samples])
    captions = [sample.caption for sample in samples]
    assert not torch.allclose(reward(images, captions), first(images, captions), atol=0.05)


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="shipped weights of `held_out_scorer` for world `2x2`"):
        HeldOutScorer(world="2x2").load()
    with pytest.raises(ConfigError, match="nowhere"):
        HeldOutScorer(weights=str(tmp_path / "nowhere")).load()


def test_an_untrained_one_is_built_for_every_world():
    for world, side in (("2x2", 24), ("3x3", 36)):
        scorer = HeldOutScorer(world=world, weights="random").load()
        assert scorer.image_settings.image_size == side
        features = scorer.encode_image(torch.zeros(2, 3, side, side))
        assert features.shape == (2, scorer.width)


def test_it_tells_where_it_comes_from_and_what_it_knows():
    part = json.loads((shipped_folder() / "provenance.json").read_text())["held_out_scorer"]
    scores = part["scores"]
    assert min(scores["clean"], scores["noisy"], scores["drawn"], scores["pairs"]) > 0.9
    assert part["run"]["steps"] > 0
    assert part["run"]["curve"]
    settings = part["run"]["model"]["init_args"]
    assert settings["max_noise"] > 0
    first = json.loads((shipped_folder() / "provenance.json").read_text())["runs"]["scorer"]
    assert part["run"]["seed"] != first["seed"]
    assert (shipped_folder() / "held_out_scorer.safetensors").stat().st_size < 2e6
