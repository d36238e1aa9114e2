"""Where foreign weights come from: local folders, the hub, and one line when there is neither."""

import fnmatch

import pytest

from segalign import hub
from segalign.errors import ConfigError

WHAT = {"what": "the text-to-image model"}
PUBLISHED = [
    "model_index.json",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "safety_checker/model.safetensors",
]


def test_a_local_folder_is_taken(tmp_path):
    (tmp_path / "unet").mkdir()
    assert hub.fetch(str(tmp_path), parts=["unet"], **WHAT) == tmp_path


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"with a folder `unet/` at .* download the whole of it"):
        hub.fetch(str(tmp_path), parts=["unet"], **WHAT)


@pytest.mark.parametrize(
    "model", ["nowhere", "models/not/here", "./models/sd15", "models/my--model", "models/sd15."]
)
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(model):
    with pytest.raises(ConfigError, match="there is no such folder"):
        hub.fetch(model, **WHAT)


def test_offline_says_what_to_download_and_where_to_put_it():
    with pytest.raises(ConfigError) as caught:
        hub.fetch("owner/some-model", **WHAT)
    message = str(caught.value)
    assert "\n" not in message
    assert "hf download owner/some-model --local-dir models/some-model" in message
    assert "give it in place of `owner/some-model`" in message


def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    (tmp_path / "tokenizer").mkdir()
    asked = {}

    def download(model, *, allow_patterns):
        asked[model] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.fetch("owner/name", parts=["unet", "tokenizer"], **WHAT) == tmp_path
    taken = [f for f in PUBLISHED if any(fnmatch.fnmatch(f, p) for p in asked["owner/name"])]
    assert taken == [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
    ]
