"""The aesthetic reward against its published formula."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from segalign.errors import ConfigError, DataError
from segalign.rewards.aesthetic import (
    Aesthetic,
    AestheticReward,
    aesthetic_head,
    load_aesthetic_head,
)
from segalign.rewards.bound_reward import bind_reward
from segalign.rewards.image_preprocessing import ImagePreprocessing

CAPTIONS = ["an owl", "a fox"]


def published(width):
    """The head as its authors' file names it."""
    torch.manual_seed(3)
    shape = {0: (width, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    weights = {}
    for number, (fan_in, fan_out) in shape.items():
        weights[f"layers.{number}.weight"] = torch.randn(fan_out, fan_in) / fan_in**0.5
        weights[f"layers.{number}.bias"] = torch.randn(fan_out)
    return weights


def reference(scorer, weights, images):
    """Score as the authors do: unit features of transformers' own method, then five lines."""
    pixels = ImagePreprocessing(scorer.image_settings)(images)
    x = scorer.model.get_image_features(pixel_values=pixels).pooler_output
    x = x / x.norm(dim=-1, keepdim=True)
    for number in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    return x[:, 0]


@pytest.fixture
def scorer(make_hugging_face):
    return make_hugging_face()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_scores_are_the_published_formula(tmp_path, scorer, images, suffix):
    weights, path = published(12), tmp_path / f"head{suffix}"
    (torch.save if suffix == ".pth" else save_file)(weights, path)
    reward = AestheticReward(scorer, load_aesthetic_head(path))
    with torch.no_grad():
        expected = reference(scorer, weights, images)
    torch.testing.assert_close(reward(images, CAPTIONS), expected, rtol=0, atol=1e-5)
    assert torch.equal(reward(images, CAPTIONS), reward(images, ["other", "words"]))
    assert expected.std() > 1e-3


def test_the_published_head_has_its_size():
    assert sum(p.numel() for p in aesthetic_head().parameters()) == 768 * 1024 + 1024 + (
        1024 * 128 + 128 + 128 * 64 + 64 + 64 * 16 + 16 + 16 + 1
    )
    assert [part.p for part in aesthetic_head() if isinstance(part, nn.Dropout)] == [0.2, 0.2, 0.1]


def test_the_gradient_is_exact(any_scorer):
    reward = AestheticReward(any_scorer, aesthetic_head(12), crop=20).double()
    images = torch.rand(1, 3, 22, 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reward(x, CAPTIONS[:1]), images, fast_mode=True, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bound_one_gives_the_same_values_unchecked(scorer, images, dtype, monkeypatch):
    reward, images = AestheticReward(scorer, aesthetic_head(12), crop=20), images.to(dtype)
    expected = reward(images, CAPTIONS)
    for check in ("check_batch", "check_features"):
        monkeypatch.delattr(f"segalign.rewards.aesthetic.{check}")
    bound = bind_reward(reward, CAPTIONS)
    nn.ModuleList([reward]).requires_grad_(True)
    reward.head.train()
    found = bound(images, torch.arange(2)).rewards
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_parent_cannot_train_it(scorer, images):
    reward = AestheticReward(scorer, aesthetic_head(12))
    expected = reward(images, CAPTIONS)
    nn.ModuleList([reward]).train().requires_grad_(True)
    reward.head.train()
    assert torch.equal(reward(images, CAPTIONS), expected)
    assert not any(p.requires_grad for p in reward.parameters())


def test_it_is_read_from_folders(tmp_path, scorer, images):
    scorer.model.save_pretrained(tmp_path / "clip")
    torch.save(published(12), tmp_path / "head.pth")
    settings = Aesthetic(model=str(tmp_path / "clip"), head=str(tmp_path), file="head.pth")
    first, second = settings.load(), settings.load()
    expected = AestheticReward(scorer, load_aesthetic_head(tmp_path / "head.pth"))(images, CAPTIONS)
    torch.testing.assert_close(first(images, CAPTIONS), expected)
    addresses = [{p.data_ptr() for p in reward.parameters()} for reward in (first, second)]
    assert not addresses[0] & addresses[1]


def test_a_head_for_another_model_is_refused(scorer):
    with pytest.raises(DataError, match="features of width 12, the model's; got 768"):
        AestheticReward(scorer, aesthetic_head())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.0.weight"), "got tensors 0.bias"),
        (lambda w: w.pop("layers.7.bias"), "7.bias"),
        (lambda w: w.update({"layers.2.weight": torch.ones(3, 3)}), "size mismatch"),
        (lambda w: w.update(more=1), "other things than named tensors"),
    ],
)
def test_foreign_heads_are_refused(tmp_path, change, message):
    weights = published(12)
    change(weights)
    torch.save(weights, tmp_path / "head.pth")
    with pytest.raises(DataError) as caught:
        load_aesthetic_head(tmp_path / "head.pth")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="head of an aesthetic predictor at"):
        Aesthetic(head=str(tmp_path)).load()
