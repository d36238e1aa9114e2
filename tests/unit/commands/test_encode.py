import json

import pytest
import torch
import webdataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import main
from segalign.data.manifest import index_shards
from segalign.text.feature_store import FeatureStore
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.tokenizer import clip_tokenizer

CAPTIONS = [f"A red cat number {i}. The sky is grey, and it rains." for i in range(30)]


def run(argv):
    return main.main(["shards", "encode", *map(str, argv)])


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "x-%d.tar"), verbose=0) as writer:
        for number, caption in enumerate(CAPTIONS):
            writer.write({"__key__": f"{number:03d}", "txt": caption})
    index_shards(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The text side of a random Stable Diffusion XL, as diffusers keeps it."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = CLIPTextConfig(**small, num_attention_heads=2, vocab_size=49408, projection_dim=8)
    folder = tmp_path_factory.mktemp("model")
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        clip_tokenizer(pad).save_pretrained(folder / name)
    return folder


def test_the_scenes_tower_is_encoded_and_read_back(shards, tmp_path, capsys):
    from segalign.scenes.base import ScenesBase

    store = tmp_path / "store"
    assert run([shards, store, "--model", "scenes"]) == 0
    shown = capsys.readouterr()
    assert "num samples    30\n" in shown.out
    assert "num sequences  33\n" in shown.out  # with the empty caption, bare and padded
    assert "set aside      none" in shown.out
    assert "encoding: 30 of 30" in shown.err
    models = ScenesBase(generator="random").load().text_models
    text_model = models.text_model.eval().requires_grad_(False)
    plain = SegmentEncoder(text_model, models.tokenizer)(CAPTIONS)
    stored = SegmentEncoder(text_model, models.tokenizer, store=FeatureStore.open(store))
    text_model.register_forward_pre_hook(lambda *_: pytest.fail("the store holds all"))
    assert torch.equal(stored(CAPTIONS).prompt_embeds, plain.prompt_embeds)


@pytest.mark.parametrize("segmenter", ["sentence", "official", "clause", "window"])
def test_a_folder_of_diffusers(shards, model_folder, tmp_path, segmenter):
    store = tmp_path / "store"
    arguments = ["--model", model_folder, "--segmenter", segmenter, "--dtype", "float16"]
    assert run([shards, store, *arguments]) == 0
    description = FeatureStore.open(store).description
    assert description["segmenter"]["name"] == segmenter
    assert description["dtype"] == "float16"


def test_the_second_tower_of_sdxl(shards, model_folder, tmp_path):
    store = tmp_path / "store"
    assert run([shards, store, "--model", model_folder, "--tower", 2, "--layer", -2]) == 0
    rows, pooled = FeatureStore.open(store).get((49406, 49407))
    assert (rows.shape, pooled.shape) == ((2, 16), (8,))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["NOWHERE", "OUT", "--model", "scenes"], 65, "error: a folder of shards was expected;"),
        (["SHARDS", "OUT"], 78, "error: "),
        (["SHARDS", "OUT", "--model", "./nowhere"], 78, "error: expected the text-to-image model"),
        (["SHARDS", "OUT", "--model", "EMPTY"], 78, "error: expected the text-to-image model with"),
        (["SHARDS", "OUT", "--model", "BARE"], 78, "error: `BARE` must hold a CLIP text model as"),
        (["SHARDS", "OUT", "--model", "scenes", "--tower", "2"], 78, "error: `--tower` must be 1"),
        (["SHARDS", "OUT", "--model", "scenes", "--layer", "-3"], 78, "error: `layer` must be"),
        (["SHARDS", "OUT", "--model", "scenes", "--device", "x"], 78, "error: `--device` must"),
        (["SHARDS", "OUT", "--model", "scenes", "--max-shard-megabytes", "0"], 78, "error: "),
        (["SHARDS", "FILE/x", "--model", "scenes"], 75, "error: expected to be able to write"),
    ],
)
def test_errors_are_one_line_with_a_code(
    shards, tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    shards.rename("SHARDS")
    for name in ("EMPTY", "BARE/text_encoder", "BARE/tokenizer"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "FILE").touch()
    assert run(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_another_model_is_not_mixed_in(shards, model_folder, tmp_path, capsys):
    store = tmp_path / "store"
    assert run([shards, store, "--model", "scenes"]) == 0
    before = json.loads((store / "store.json").read_text())
    assert run([shards, store, "--model", model_folder]) == 65
    assert "it holds one with another `weights`; choose another" in capsys.readouterr().err
    assert json.loads((store / "store.json").read_text()) == before
