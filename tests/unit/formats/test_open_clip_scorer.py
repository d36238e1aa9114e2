import json
import pickle

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from segalign.errors import ConfigError, DataError
from segalign.formats import open_clip_scorer as module
from segalign.formats.open_clip_scorer import load_open_clip_scorer, random_open_clip_scorer
from segalign.rewards.segment_scorer import SegmentScorer

VIT = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TINY = {"embed_dim": 8, "vision_cfg": VIT, "text_cfg": TEXT}


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    """Add small architectures to those that open_clip knows."""
    known = {
        "tiny": TINY,
        "tiny-timm": {
            **TINY,
            "vision_cfg": {
                "timm_model_name": "test_resnet",
                "timm_model_pretrained": True,
                "image_size": 64,
            },
        },
        "tiny-scale": {**TINY, "nonscalar_logit_scale": True},
        "tiny-custom": {**TINY, "custom_text": True},
        "not-causal": {**TINY, "custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True}},
        "roberta": {**TINY, "text_cfg": {"hf_model_name": "roberta-base"}},
        "other-tokens": {**TINY, "text_cfg": {**TEXT, "hf_tokenizer_name": "bert-base-uncased"}},
        "captions": {**TINY, "multimodal_cfg": {"width": 8}},
        "broken": {**TINY, "vision_cfg": {**VIT, "nonsense": 1}},
    }
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return open_clip.CLIP(**TINY).eval()


def features(scorer):
    scorer = SegmentScorer(scorer)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return torch.cat([scorer.image_features(images), scorer.text_features(["a red owl"])])


def expected(model):
    return features(module.open_clip_scorer(model))


def refused(path, error=DataError, **settings):
    with pytest.raises(error) as caught:
        load_open_clip_scorer(str(path), **{"architecture": "tiny", **settings})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hpsv2_file(model):
    """Weights as HPSv2 and others have them, with what else training writes."""
    weights = {f"module.{name}": value.half() for name, value in model.state_dict().items()}
    weights["module.attn_mask"] = torch.zeros(77, 77)
    weights["module.logit_scale"] = weights["module.logit_scale"].reshape(1)
    return {"state_dict": weights, "epoch": 3, "name": "hps", "optimizer": {"lr": [1e-3]}}


def test_checkpoints_of_training_are_read(tmp_path, model):
    torch.save(hpsv2_file(model), tmp_path / "HPS.pt")
    scorer = load_open_clip_scorer(str(tmp_path / "HPS.pt"), architecture="tiny")
    assert {(p.dtype, p.requires_grad) for p in scorer.model.parameters()} == {
        (torch.float32, False)
    }
    assert not scorer.model.training
    assert scorer.image_settings == module.open_clip_scorer(model).image_settings
    torch.testing.assert_close(features(scorer), expected(model.half().float()))
    from_folder = load_open_clip_scorer(str(tmp_path), architecture="tiny", file="HPS.pt")
    assert torch.equal(features(from_folder), features(scorer))


def test_scales_are_read_with_and_without_a_dimension(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "w.pt")
    scorer = load_open_clip_scorer(str(tmp_path / "w.pt"), architecture="tiny-scale")
    assert scorer.logit_scale.tolist() == [model.logit_scale.item()]


def test_folders_of_open_clip_are_read(tmp_path, model):
    described = {"mean": [0.5, 0.4, 0.3], "std": 0.5, "interpolation": "bilinear",
                 "resize_mode": "squash", "size": [16, 16]}  # fmt: skip
    config = {"model_cfg": TINY, "preprocess_cfg": described}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    pickled = load_open_clip_scorer(str(tmp_path))
    torch.testing.assert_close(features(pickled), features(pickled._replace(model=model)))
    settings = pickled.image_settings
    assert (settings.mean, settings.std) == ((0.5, 0.4, 0.3), (0.5, 0.5, 0.5))
    assert (settings.resize, settings.fit, settings.image_size) == ("bilinear", "squash", 16)
    torch.nn.init.zeros_(model.visual.conv1.weight)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    safe = load_open_clip_scorer(str(tmp_path))
    assert safe.model.visual.conv1.weight.abs().sum() == 0


def test_two_of_one_file_share_nothing(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    first, second = (
        load_open_clip_scorer(str(tmp_path / "w.safetensors"), architecture="tiny")
        for _ in range(2)
    )
    before = features(second)
    with torch.no_grad():
        for weight in first.model.parameters():
            weight.fill_(0.5)
    assert torch.equal(features(second), before)


@pytest.mark.parametrize("architecture", ["tiny", "tiny-timm", "tiny-custom"])
def test_random_models_need_no_file_and_no_network(architecture, monkeypatch):
    import timm

    made = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: made.append(k["pretrained"]) or create(*a, **k)
    )
    scorer = random_open_clip_scorer(architecture)
    assert not any(p.requires_grad for p in scorer.model.parameters())
    assert made == ([False] if architecture == "tiny-timm" else [])


def test_code_in_a_file_never_runs(tmp_path, payload, model):
    torch.save({**hpsv2_file(model), "epoch": payload}, tmp_path / "w.pt")
    assert "mkdir`, which could run code and was not loaded" in refused(tmp_path / "w.pt")
    assert not payload.mark.exists()
    # The payload is live: a reader without the restriction runs it.
    pickle.loads(pickle.dumps(payload))
    assert payload.mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual.proj"), "got no tensor `visual.proj`"),
        (lambda w: w.update(more=torch.ones(1)), "got an unknown tensor `more`"),
        (lambda w: w.update({"visual.proj": torch.ones(2, 2)}), "size mismatch for visual.proj"),
        (lambda w: w.update(more=1), "other things than named tensors"),
    ],
)
def test_foreign_weights(tmp_path, model, change, message):
    weights = dict(model.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "w.pt")
    assert message in refused(tmp_path / "w.pt")


def test_damaged_weights(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"not so safe")
    assert "expected the weights of an `open_clip` model" in refused(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("tinny", "got `tinny`; near it are `tiny`"),
        ("not-causal", "bidirectional attention"),
        ("roberta", "`roberta` has `hf_model_name: roberta-base`"),
        ("other-tokens", "`hf_tokenizer_name: bert-base-uncased`"),
        ("captions", "a captioning model"),
        ("broken", "`broken` cannot: .*nonsense"),
    ],
)
def test_architectures_of_another_kind(architecture, message):
    with pytest.raises(ConfigError, match=message) as caught:
        random_open_clip_scorer(architecture)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path, model):
    assert "expected the scorer at" in refused(tmp_path / "none", ConfigError)
    assert "`open_clip_model.safetensors` or" in refused(tmp_path, ConfigError)
    assert "`x.pt`" in refused(tmp_path, ConfigError, file="x.pt")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    found = refused(tmp_path / "w.pt", ConfigError, architecture=None)
    assert "expected `open_clip_config.json` beside" in found
    (tmp_path / "open_clip_config.json").write_text("[]")
    assert "expected the config of an" in refused(tmp_path / "w.pt", architecture=None)


@pytest.mark.parametrize(
    "described", [{"resize_mode": "stretch"}, {"resize_mode": "longest", "fill_color": 255}]
)
def test_images_made_square_in_other_ways(model, described):
    model.visual.preprocess_cfg = described
    with pytest.raises(ConfigError, match="expected square images, by `resize_mode` `shortest`"):
        module.open_clip_scorer(model)
