"""Training of the scorers of scenes: any scorer, with noise, and what only transformers' has."""

from functools import partial

import pytest
import torch

from lightning_modules.scenes_scorer import ScenesScorerModule
from segalign.errors import ConfigError
from segalign.scenes.samples import make_sample
from segalign.scenes.scorers import HeldOutScorer, ScenesScorer

HELD_OUT = HeldOutScorer(weights="random")
FIRST = ScenesScorer(weights="random")


def build(scorer, **settings):
    torch.manual_seed(0)
    module = ScenesScorerModule(partial(torch.optim.SGD, lr=0.05), scorer=scorer, **settings)
    module.configure_model()
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: float(value)})
    return module


def scenes(count=4):
    samples = [make_sample("3x3", 9, index, length="short") for index in range(count)]
    images = torch.stack([torch.from_numpy(sample.image.copy()) for sample in samples])
    return {
        "images": images.permute(0, 3, 1, 2).float() / 255,
        "captions": [sample.caption for sample in samples],
        "metadata": [sample.metadata for sample in samples],
        "sample_ids": torch.arange(count),
        "valid": torch.ones(count, dtype=torch.bool),
    }


def test_the_held_out_scorer_trains():
    module = build(HELD_OUT, read_before_end=False, max_noise=0.3)
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        module.training_step(scenes(), 0).backward()
        optimizer.step()
    assert module.logged.keys() >= {"train/dense_accuracy", "train/contrastive_loss", "train/loss"}
    unchanged = [name for name, t in module.named_parameters() if torch.equal(t, before[name])]
    assert unchanged == []
    module.eval()
    module.validation_step(scenes(), 0)
    assert 0 <= module.logged["val/dense_accuracy"] <= 1


def test_texts_are_read_once_or_twice():
    texts = ["The top left is empty.", "Behind all of it there is plain white."]
    once = build(HELD_OUT, read_before_end=False).pooled_features(texts)
    assert once.shape == (1, 2, HELD_OUT.load().width)
    twice = build(FIRST)
    features = twice.pooled_features(texts)
    assert features.shape == (2, 2, 128)
    torch.testing.assert_close(features[0], twice.scorer.text_features(texts))
    assert not torch.allclose(features[1], features[0], atol=0.1)


@pytest.mark.parametrize("settings", [{}, {"read_before_end": False, "reading_weight": 0.5}])
def test_what_only_transformers_models_can_do_is_refused(settings):
    with pytest.raises(ConfigError, match="`read_before_end` and `reading_weight`; got `HeldOut"):
        build(HELD_OUT, **settings)


def test_noise_is_a_function_of_seed_step_and_sample():
    module = build(HELD_OUT, read_before_end=False, max_noise=0.3)
    batch = scenes()
    noisy = module._noisy(batch)
    assert torch.equal(noisy, module._noisy(batch))
    assert 0 <= noisy.min() < noisy.max() <= 1
    alone = {**batch, "images": batch["images"][2:3], "sample_ids": batch["sample_ids"][2:3]}
    assert torch.equal(module._noisy(alone), noisy[2:3])
    assert torch.equal(build(HELD_OUT, read_before_end=False)._noisy(batch), batch["images"])
