"""Scores and their image gradients against the official LongAlign code (commit 61a1021).

Golden G3. Tolerances are the golden files' own suggestion: scores 1e-6 absolute, gradients 5e-5 in
the relative L2 norm.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.rewards.clip_reward import ClipReward
from segalign.rewards.common_direction import BatchDirection
from segalign.text.segmenter import OfficialSegmenter
from segalign.text.tokenizer import clip_tokenizer

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden"
G3 = json.loads((GOLDEN / "g3_scores.json").read_text())
CAPTIONS = G3["captions"]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "g3_scores.safetensors")


@pytest.fixture(scope="module")
def scorer():
    weights = {k: v.float() for k, v in load_file(GOLDEN / "scorer_clip.safetensors").items()}
    rows = next(name for name in weights if name.endswith("weight.rows"))
    table = torch.zeros(49408, weights[rows].shape[1])
    table[weights.pop(rows.replace(".rows", ".ids")).long()] = weights.pop(rows)
    weights[rows.removesuffix(".rows")] = table
    model = CLIPModel(CLIPConfig(**G3["scorer_config"]))
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all("position_ids" in name for name in missing.missing_keys)
    return ClipScorer(model, clip_tokenizer(), ImageSettings())


def reward(scorer, call, **settings):
    """Build our reward as the official function behind a case works."""
    described = G3["calls"][call]
    if described["fn"] == "dense_score":
        settings["segmenter"] = OfficialSegmenter()
    if described["kwargs"].get("do_ortho"):
        settings.setdefault("common_direction", BatchDirection())
    return ClipReward(scorer, resize="bilinear", omega=described["weight_used"], **settings)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def image_512():
    axis = torch.arange(512, dtype=torch.float64)
    b, c = torch.arange(2).view(2, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
    y, x = axis.view(512, 1), axis.view(1, 512)
    turn = 2 * math.pi
    first = torch.sin(turn * (0.013 * (b + 1) * x + 0.007 * (c + 1) * y))
    second = torch.cos(turn * (0.031 * (c + 1) * x * y / 512 + 0.1 * b))
    return (0.5 + 0.25 * first + 0.25 * second).float()


@pytest.mark.parametrize(
    "call",
    ["dense", "dense_ortho", "dense_ortho_w0", "dense_ortho_w1", "pick", "pick_ortho", "clip",
     "clip_ortho"],
)  # fmt: skip
def test_scores_and_gradients(scorer, golden, call):
    images = golden["image_small"].clone().requires_grad_(True)
    scores = reward(scorer, call)(images, CAPTIONS)
    assert (scores - golden[f"{call}.score"]).abs().max() < 1e-6
    scores.sum().backward()
    assert images.grad.norm().item() == pytest.approx(G3["calls"][call]["grad_norm"], rel=5e-5)
    if f"{call}.grad" in golden:
        assert relative(images.grad, golden[f"{call}.grad"]) < 5e-5


def test_the_direction_of_two_ranks(scorer, golden):
    def two_ranks(text_features):
        own = text_features.mean(dim=0)
        return torch.nn.functional.normalize(own + golden["other_rank_ortho"], dim=0)

    ours = reward(scorer, "dense_ortho_2rank", common_direction=two_ranks)
    scores = ours(golden["image_small"], CAPTIONS)
    assert (scores - golden["dense_ortho_2rank.score"]).abs().max() < 1e-6


def test_segments_in_any_order(scorer, golden):
    owners = G3["batch_ids_noncontiguous"]
    captions = [
        "".join(s for s, owner in zip(G3["segments"], owners, strict=True) if owner == caption)
        for caption in range(3)
    ]
    scores = reward(scorer, "dense_noncontiguous")(golden["image_small"], captions)
    assert (scores - golden["dense_noncontiguous.score"]).abs().max() < 1e-6


def test_a_batch_of_one_is_only_rescaled(scorer, golden):
    image, caption = golden["image_small"][:1], CAPTIONS[:1]
    plain, reweighted = (
        reward(scorer, call)(image, caption) for call in ("dense_b1", "dense_b1_ortho")
    )
    assert (plain - golden["dense_b1.score"]).abs().max() < 1e-6
    assert (reweighted - golden["dense_b1_ortho.score"]).abs().max() < 1e-6
    assert (reweighted / plain).item() == pytest.approx(G3["b1_ortho_over_plain"], rel=1e-4)


def test_the_image_that_the_crops_are_of(golden):
    found = image_512()[:, :, 7::101, 11::97]
    torch.testing.assert_close(found, golden["image_512_check"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("call", ["dense_crop_ortho", "pick_crop_ortho"])
def test_cropped_scores_and_gradients(scorer, golden, call, monkeypatch):
    described = G3["calls"][call]
    ours = reward(scorer, call, crop=504)
    top, left, *_ = described["crop_top_left_h_w"]
    monkeypatch.setattr(ours.scorer.preprocessing, "crop_place", lambda height, width: (top, left))
    images = image_512().requires_grad_(True)
    scores = ours(images, CAPTIONS[:2])
    assert (scores - golden[f"{call}.score"]).abs().max() < 1e-6
    scores.sum().backward()
    assert images.grad.norm().item() == pytest.approx(described["grad_norm"], rel=5e-5)
    assert relative(images.grad[:, :, 5::17, 3::19], golden[f"{call}.grad_sub"]) < 5e-5
