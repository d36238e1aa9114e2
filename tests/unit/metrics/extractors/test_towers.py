"""Towers of timm and transformers by the route of a file: the libraries' own features."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from toy_weights import drawn_state, pixels_of, write_weights
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from segalign.errors import ConfigError, DataError
from segalign.metrics.extractors.timm_tower import TimmTower
from segalign.metrics.extractors.transformers_tower import TransformersTower

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = drawn_state(timm.create_model("test_vit"))  # with a classifier
    return write_weights(state, tmp_path_factory.mktemp("timm") / "model.safetensors")


def prepared(pixels: torch.Tensor, side: int, mean, std) -> torch.Tensor:
    images = F.interpolate(pixels.float() / 255, (side, side), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


@pytest.mark.parametrize("pool", ["model", "token", "mean"])
def test_features_are_those_of_timm(vit_file: Path, pool):
    tower = TimmTower("test_vit", str(vit_file), image_size=None, pool=pool).load()
    reference = timm.create_model("test_vit", checkpoint_path=str(vit_file)).eval()
    reference.reset_classifier(0)
    pixels = pixels_of(2, 64, 36)
    config = reference.pretrained_cfg
    images = prepared(pixels, 160, config["mean"], config["std"])
    with torch.no_grad():
        states = reference.forward_features(images)
        expected = {
            "model": reference(images),
            "token": states[:, 0],
            "mean": states[:, 1:].mean(1),
        }
    features, logits = tower(pixels)
    assert logits is None
    assert features.shape == (2, 64) == (2, tower.num_features)
    assert features.std(dim=0).mean() > 1e-3, "the images must differ"
    torch.testing.assert_close(features, expected[pool], rtol=1e-5, atol=1e-5)
    assert pool in tower.protocol()["layer"]


def test_places_are_interpolated_to_another_size(tmp_path: Path):
    name = "test_vit3"  # it refuses images of another size than it was made for
    file = write_weights(drawn_state(timm.create_model(name)), tmp_path / "weights.pth")
    tower = TimmTower(name, str(file), image_size=96).load()
    reference = timm.create_model(name, checkpoint_path=str(file), dynamic_img_size=True).eval()
    reference.reset_classifier(0)
    config = reference.pretrained_cfg
    pixels = pixels_of(2, 36, 36)
    with torch.no_grad():
        expected = reference(prepared(pixels, 96, config["mean"], config["std"]))
    torch.testing.assert_close(tower(pixels).features, expected, rtol=1e-5, atol=1e-5)
    assert tower.protocol()["input_size"] == 96


def test_a_size_that_patches_do_not_fill_is_refused(vision_folder: Path, tmp_path: Path):
    # Both would take it, and never see the last rows and columns.
    write_weights(drawn_state(timm.create_model("test_vit3")), tmp_path / "model.safetensors")
    dinov2_folder(tmp_path / "dinov2")
    for source in (
        TimmTower("test_vit3", str(tmp_path), image_size=90),
        TransformersTower(str(tmp_path / "dinov2"), image_size=50),
    ):
        with pytest.raises(ConfigError, match=r"`image_size` that the tower can take; .*patches"):
            source.load()
    with pytest.raises(ConfigError, match="`image_size` that the tower can take; got 42"):
        TransformersTower(str(vision_folder), image_size=42).load()


def test_a_folder_and_a_convolutional_tower(tmp_path: Path):
    save_file(drawn_state(timm.create_model("test_convnext")), tmp_path / "model.safetensors")
    tower = TimmTower("test_convnext", str(tmp_path), image_size=64, pool="mean", unit=True).load()
    features = tower(pixels_of(3, 36, 36)).features
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert tower.protocol()["unit"] is True
    with pytest.raises(ConfigError, match="class token"):
        TimmTower("test_convnext", str(tmp_path), image_size=64, pool="token").load()


def test_timm_refuses_what_is_not_there_or_foreign(vit_file: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a model of timm; got `vit_of_nobody`"):
        TimmTower("vit_of_nobody").load()
    with pytest.raises(ConfigError, match="the vision tower `timm/test_vit` in the hub's cache"):
        TimmTower("test_vit").load()
    with pytest.raises(DataError, match="Missing key"):
        TimmTower("test_convnext", str(vit_file), image_size=None).load()
    with pytest.raises(ConfigError, match="`pool` to be"):
        TimmTower("test_vit", pool="max")


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_loading_and_looking_leave_no_trace(vit_file: Path, vision_folder: Path, kind):
    source = (
        TimmTower("test_vit", str(vit_file), image_size=None)
        if kind == "timm"
        else TransformersTower(str(vision_folder))
    )
    before = torch.get_rng_state()
    tower, pixels = source.load(), pixels_of(1, 36, 36)
    expected = tower(pixels).features
    tower.network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tower(pixels).features, expected)
    assert torch.equal(before, torch.get_rng_state())
    json.dumps(tower.protocol())
    assert tower.protocol() == source.load().protocol()


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip_vision")
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY, projection_dim=8))
    model.load_state_dict(drawn_state(model))
    model.save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder


def test_clip_gives_its_projection_at_length_one(vision_folder: Path):
    tower = TransformersTower(str(vision_folder)).load()
    reference = CLIPVisionModelWithProjection.from_pretrained(vision_folder).eval()
    pixels = pixels_of(2, 64, 36)
    with torch.no_grad():
        expected = reference(pixel_values=prepared(pixels, 28, MEAN, STD)).image_embeds
    torch.testing.assert_close(tower(pixels).features, F.normalize(expected), rtol=1e-5, atol=1e-5)
    raw = TransformersTower(str(vision_folder), unit=False).load()
    torch.testing.assert_close(raw(pixels).features, expected, rtol=1e-5, atol=1e-5)
    assert raw.protocol() != tower.protocol()
    assert tower.num_features == 8


def test_the_image_half_of_a_whole_clip_is_the_same(vision_folder: Path, tmp_path: Path):
    vision = CLIPVisionModelWithProjection.from_pretrained(vision_folder)
    text = {**TINY, "vocab_size": 49408, "num_hidden_layers": 1}
    whole = CLIPModel(CLIPConfig(vision_config=TINY, text_config=text, projection_dim=8))
    lacking = whole.load_state_dict(vision.state_dict(), strict=False).unexpected_keys
    assert not lacking
    whole.save_pretrained(tmp_path)
    processor = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(image_mean=MEAN, image_std=STD, **processor).save_pretrained(tmp_path)
    one, other = (TransformersTower(str(folder)).load() for folder in (vision_folder, tmp_path))
    pixels = pixels_of(2, 28, 28)
    torch.testing.assert_close(one(pixels).features, other(pixels).features)


def dinov2_folder(folder: Path) -> Dinov2Model:
    sizes = {name: size for name, size in TINY.items() if name != "intermediate_size"}
    model = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return model


def test_another_tower_pools_as_it_does(tmp_path: Path):
    model = dinov2_folder(tmp_path)
    tower = TransformersTower(str(tmp_path), image_size=42, unit=False).load()
    pixels = pixels_of(2, 36, 64)
    with torch.no_grad():
        expected = model(prepared(pixels, 42, MEAN, STD)).pooler_output
    torch.testing.assert_close(tower(pixels).features, expected, rtol=1e-5, atol=1e-5)


def test_transformers_refuses_what_is_not_there_or_lacks_weights(
    vision_folder: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match="expected the vision tower `nobody/none` in the hub's"):
        TransformersTower("nobody/none").load()
    (tmp_path / "config.json").write_bytes((vision_folder / "config.json").read_bytes())
    CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected the vision tower as config and safetensors"):
        TransformersTower(str(tmp_path)).load()
    state = CLIPVisionModelWithProjection.from_pretrained(vision_folder).state_dict()
    state.pop("visual_projection.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no weight of the right shape for `visual_projection"):
        TransformersTower(str(tmp_path)).load()
