import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from segalign.errors import ConfigError, DataError
from segalign.formats.clip_scorer import ImageSettings, load_clip_scorer, save_clip_scorer
from segalign.text.tokenizer import VOCAB_SIZE

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"


@pytest.fixture
def model():
    torch.manual_seed(0)
    tower = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**tower, "vocab_size": VOCAB_SIZE, "eos_token_id": VOCAB_SIZE - 1}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()


@pytest.fixture
def folder(tmp_path, model):
    """The model alone, without tokenizer and image settings."""
    model.save_pretrained(tmp_path / "scorer")
    return tmp_path / "scorer"


def pickle_weights(folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / PICKLED)


def features(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[VOCAB_SIZE - 2, 320, 1125, VOCAB_SIZE - 1]])
    images = torch.randn(1, 3, 32, 32, generator=generator)
    with torch.no_grad():
        text = model.get_text_features(input_ids=ids).pooler_output
        return torch.cat([text, model.get_image_features(pixel_values=images).pooler_output])


def refused(folder):
    with pytest.raises(DataError) as caught:
        load_clip_scorer(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_safetensors_are_read_as_float32_and_frozen(folder, model, dtype):
    model.to(dtype).save_pretrained(folder)
    scorer = load_clip_scorer(str(folder))
    assert not scorer.model.training
    assert {(p.dtype, p.requires_grad) for p in scorer.model.parameters()} == {
        (torch.float32, False)
    }
    expected = features(model.float())
    torch.testing.assert_close(features(scorer.model), expected, rtol=0, atol=1e-6)


def test_pickled_tensors_are_read(folder, model):
    pickle_weights(folder, model.state_dict())
    loaded = load_clip_scorer(str(folder)).model
    torch.testing.assert_close(features(loaded), features(model), rtol=0, atol=1e-6)


def test_old_position_buffers_are_ignored(folder, model):
    old = {
        f"{tower}_model.embeddings.position_ids": torch.arange(5) for tower in ("text", "vision")
    }
    pickle_weights(folder, {**model.state_dict(), **old})
    loaded = load_clip_scorer(str(folder)).model
    torch.testing.assert_close(features(loaded), features(model), rtol=0, atol=1e-6)


def test_code_in_pickled_weights_never_runs(folder, payload, model):
    pickle_weights(folder, {**model.state_dict(), "logit_scale": payload})
    assert "mkdir`, which could run code and was not loaded" in refused(folder)
    assert not payload.mark.exists()
    # The payload is live: a reader without the restriction runs it.
    pickle.loads(pickle.dumps(payload))
    assert payload.mark.exists()


@pytest.mark.parametrize("content", [[1], {"logit_scale": 1}, {"x": torch.ones(1, device="meta")}])
def test_pickles_of_other_things(folder, content):
    pickle_weights(folder, content)
    assert "of other things than named tensors" in refused(folder)


def test_saved_scorer_is_read_back_and_by_transformers(folder, tmp_path, model):
    scorer = load_clip_scorer(str(folder))
    settings = type(scorer.image_settings)(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_clip_scorer(scorer._replace(image_settings=settings), tmp_path / "out")
    again = load_clip_scorer(str(tmp_path / "out"))
    assert again.image_settings == settings
    stored, kept = again.model.state_dict(), model.state_dict()
    assert stored.keys() == kept.keys()
    assert all(torch.equal(stored[name], kept[name]) for name in kept)
    assert list((tmp_path / "out").glob("*.bin")) == []
    assert (
        again.tokenizer("A red bicycle.").input_ids == scorer.tokenizer("A red bicycle.").input_ids
    )
    assert isinstance(CLIPTokenizer.from_pretrained(tmp_path / "out"), CLIPTokenizer)
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert tuple(processor.image_mean) == settings.mean
    picture = (torch.rand(3, 40, 50) * 255).to(torch.uint8)
    assert processor(picture, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    CLIPModel.from_pretrained(tmp_path / "out")


def test_image_settings_of_a_processor_are_read(folder):
    processor = CLIPProcessor(
        CLIPImageProcessor(size=32, crop_size=32, image_mean=[0.5] * 3, image_std=[0.25] * 3),
        load_clip_scorer(str(folder)).tokenizer,
    )
    processor.save_pretrained(folder)
    assert (folder / "processor_config.json").is_file()
    assert load_clip_scorer(str(folder)).image_settings.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_filter_and_fit_are_kept(folder, tmp_path, fit, resize):
    scorer = load_clip_scorer(str(folder))
    settings = ImageSettings(image_size=32, fit=fit, resize=resize)
    save_clip_scorer(scorer._replace(image_settings=settings), tmp_path / "out")
    assert load_clip_scorer(str(tmp_path / "out")).image_settings == settings


def test_padding_cannot_be_kept(folder, tmp_path):
    scorer = load_clip_scorer(str(folder))
    padded = scorer._replace(image_settings=ImageSettings(image_size=32, fit="pad"))
    with pytest.raises(ConfigError, match=r"cropped or squashed .*; got `pad`"):
        save_clip_scorer(padded, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"size": 40, "crop_size": 32}, "resized to {'shortest_edge': 40} and cut"),
        ({"size": 32, "crop_size": 24}, "cut to {'height': 24, 'width': 24}"),
        ({"size": 32, "crop_size": 32, "do_center_crop": False}, "for an input of 32"),
        ({"size": 32, "crop_size": 32, "resample": 0}, "the resize filter 0"),
    ],
)
def test_images_prepared_in_other_ways_are_refused(folder, settings, found):
    CLIPImageProcessor(**settings).save_pretrained(folder)
    assert found in refused(folder)


def test_what_is_missing_is_clips_own(folder):
    scorer = load_clip_scorer(str(folder))
    assert scorer.image_settings.image_size == 32
    assert scorer.image_settings.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert scorer.tokenizer("a").input_ids == [49406, 320, 49407]


def test_missing_key(folder):
    stored = load_file(folder / WEIGHTS)
    del stored["visual_projection.weight"]
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    assert "got no tensor `visual_projection.weight`" in refused(folder)


def test_another_shape(folder):
    stored = load_file(folder / WEIGHTS)
    stored["visual_projection.weight"] = torch.ones(6, 9)
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    assert "expected a whole CLIP model" in refused(folder)


@pytest.mark.parametrize("name", [WEIGHTS, PICKLED])
def test_truncated_weights(folder, model, name):
    if name == PICKLED:
        pickle_weights(folder, model.state_dict())
    (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
    assert "expected a whole CLIP model" in refused(folder)


def test_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "expected a whole CLIP model" in refused(folder)


def test_another_kind_of_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    assert "got a model of type `siglip`" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "no readable `config.json`" in refused(folder)


@pytest.mark.parametrize(
    ("mean", "found"), [([0.5], "image mean (0.5,)"), ("x", "image settings that cannot be read")]
)
def test_image_settings_that_make_no_sense(folder, mean, found):
    settings = {"image_mean": mean, "image_std": [1, 1, 1], "image_processor_type": "CLIPImage"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert found in refused(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="expected the scorer at"):
        load_clip_scorer(str(tmp_path / "none"))


def test_folder_with_content_is_not_overwritten(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    scorer = load_clip_scorer(str(folder))
    with pytest.raises(ConfigError, match="has content"):
        save_clip_scorer(scorer, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
