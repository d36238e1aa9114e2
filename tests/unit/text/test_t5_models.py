import json

import pytest
import torch
from toy_t5 import toy_t5, toy_t5_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from segalign.errors import ConfigError
from segalign.text.t5_encoder import T5Encoder
from segalign.text.t5_models import byte_t5_tokenizer, load_t5, random_t5


@pytest.fixture
def folder(tmp_path):
    toy_t5().save_pretrained(tmp_path)
    toy_t5_tokenizer(["cat"]).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_t5(str(folder))
    assert "\n" not in str(error.value)
    assert "; download the whole model" in str(error.value)


def test_a_folder_is_read_as_it_was_written(folder):
    model, tokenizer = load_t5(str(folder))
    expected = toy_t5().state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert tokenizer("a cat!")["input_ids"] == toy_t5_tokenizer(["cat"])("a cat!")["input_ids"]
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_random_model_can_be_written_and_read(tmp_path):
    model, tokenizer = load_t5("tiny", init="random")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = T5Encoder(*load_t5(str(tmp_path)), token_budget=20)
    assert torch.equal(
        again(["a cat"]).prompt_embeds,
        T5Encoder(model, tokenizer, token_budget=20)(["a cat"]).prompt_embeds,
    )


def test_precision_is_the_one_asked_for(folder):
    for model, _ in (
        load_t5(str(folder), dtype=torch.bfloat16),
        load_t5("tiny", init="random", dtype=torch.bfloat16),
    ):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_large_has_the_size_of_the_published_encoder():
    with torch.device("meta"):
        model = random_t5("large")
    layer = 4 * 1024 * 1024 + 2 * 1024 * 4096 + 2 * 1024
    expected = 32_128 * 1024 + 24 * layer + 1024 + 32 * 16
    assert sum(weight.numel() for weight in model.parameters()) == expected == 334_939_648


def test_random_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    first, same, other = random_t5("tiny"), random_t5("tiny"), random_t5("tiny", seed=1)
    assert torch.equal(first.shared.weight, same.shared.weight)
    assert not torch.equal(first.shared.weight, other.shared.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training


def test_byte_tokenizer_fits_every_size():
    tokenizer = byte_t5_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 259)
    assert tokenizer("é")["input_ids"] == [0xC3 + 3, 0xA9 + 3, 1]
    assert len(tokenizer) <= random_t5("tiny").config.vocab_size


def test_large_is_known_by_its_hub_id(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "segalign.text.t5_models.random_t5", lambda size, seed: sizes.append(size) or toy_t5()
    )
    for name in ("large", "t5-large", "google-t5/t5-large", "tiny"):
        load_t5(name, init="random")
    assert sizes == ["large", "large", "large", "tiny"]
    with pytest.raises(ConfigError, match=r"`large`, `tiny`.*got `google-t5/t5-3b`"):
        load_t5("google-t5/t5-3b", init="random")


def test_offline_and_absent_says_what_to_download(tmp_path):
    with pytest.raises(ConfigError, match=r"the T5 model at `.*nowhere`") as error:
        load_t5(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_damaged_files_are_refused(folder, name):
    (folder / name).write_text("{ damaged")
    refused(folder, "expected the T5 model with config, safetensors and tokenizer")
    (folder / name).unlink()
    refused(folder, "expected the T5 model with config, safetensors and tokenizer")


def test_a_model_without_a_vocabulary_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, r"neither `tokenizer\.json` nor `spiece\.model`")


def test_pickled_weights_are_refused(folder):
    weights = toy_t5().state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, "got OSError")


def test_another_kind_of_model_is_refused(folder):
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    CLIPTextModel(text).save_pretrained(folder)
    refused(folder, "a model of type `clip_text_model`")


def test_weights_that_are_missing_or_of_other_shapes_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    refused(folder, r"no weight of the right shape for `encoder\.block\.2\.")
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": 50}))
    refused(folder, "shape|size")
