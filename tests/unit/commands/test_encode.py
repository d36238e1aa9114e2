import json
import shutil

import pytest
import torch
import webdataset
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import main
from segalign.data.manifest import index_shards
from segalign.diffusion.model_sizes import random_parts
from segalign.diffusion.pretrained import PretrainedModel
from segalign.errors import ConfigError
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


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny text-to-image model, as diffusers keeps it."""
    parts = random_parts("tiny", seed=0, device=torch.device("cpu"))
    named = {
        "unet": parts.unet,
        "vae": parts.vae,
        "text_encoder": parts.text_models.text_model,
        "tokenizer": parts.text_models.tokenizer,
        "scheduler": DDIMScheduler(),
    }
    folder = tmp_path_factory.mktemp("base")
    for name, part in named.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bfloat16_base_reads_its_own_store(shards, base_folder, tmp_path, dtype):
    store = tmp_path / "store"
    arguments = ["--model", base_folder, "--weights-dtype", "bfloat16", "--dtype", dtype]
    assert run([shards, store, *arguments]) == 0
    models = PretrainedModel(model=str(base_folder), dtype="bfloat16").load().text_models
    models.text_model.requires_grad_(False)
    plain = SegmentEncoder(models.text_model, models.tokenizer)(CAPTIONS)
    stored = SegmentEncoder(models.text_model, models.tokenizer, store=FeatureStore.open(store))
    models.text_model.register_forward_pre_hook(lambda *_: pytest.fail("the store holds all"))
    again = stored(CAPTIONS)
    assert again.prompt_embeds.dtype == torch.bfloat16
    assert torch.equal(again.prompt_embeds, plain.prompt_embeds)
    assert torch.equal(again.pooled, plain.pooled)


def test_a_store_of_another_precision_names_both_remedies(shards, base_folder, tmp_path):
    store = tmp_path / "store"
    assert run([shards, store, "--model", base_folder]) == 0
    models = PretrainedModel(model=str(base_folder), dtype="bfloat16").load().text_models
    message = (
        "features of weights in float32, the model's are in bfloat16; set the model's `dtype` to "
        "float32, or make another with `shards encode --weights-dtype bfloat16`"
    )
    with pytest.raises(ConfigError, match=message):
        SegmentEncoder(models.text_model, models.tokenizer, store=FeatureStore.open(store))


def lose_a_weight(folder):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights[min(name for name in weights if "final_layer_norm" in name)]
    save_file(weights, path, metadata={"format": "pt"})


def cut_the_weights(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_the_vocabulary(folder):
    for path in (folder / "tokenizer").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lose_a_weight, "no weight of the right shape for `final_layer_norm.bias`"),
        (cut_the_weights, "SafetensorError"),
        (lose_the_vocabulary, "no `tokenizer.json`, nor `vocab.json`"),
    ],
)
def test_a_damaged_model_gives_no_store(shards, base_folder, tmp_path, capsys, damage, found):
    broken = shutil.copytree(base_folder, tmp_path / "broken")
    damage(broken)
    assert run([shards, tmp_path / "store", "--model", broken]) == 78
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: expected the text-to-image model's `")
    assert found in error
    assert not (tmp_path / "store" / "store.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["NOWHERE", "OUT", "--model", "scenes"], 65, "error: a folder of shards was expected;"),
        (["SHARDS", "OUT"], 78, "error: "),
        (["SHARDS", "OUT", "--model", "./nowhere"], 78, "error: expected the text-to-image model"),
        (["SHARDS", "OUT", "--model", "EMPTY"], 78, "error: expected the text-to-image model with"),
        (["SHARDS", "OUT", "--model", "BARE"], 78, "error: expected the text-to-image model's"),
        (["SHARDS", "OUT", "--model", "scenes", "--tower", "2"], 78, "error: `--tower` must be 1"),
        (["SHARDS", "OUT", "--model", "scenes", "--layer", "-3"], 78, "error: `layer` must be"),
        (["SHARDS", "OUT", "--model", "scenes", "--device", "x"], 78, "error: expected a device"),
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
