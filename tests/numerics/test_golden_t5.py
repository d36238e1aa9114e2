"""T5 branch and text adapter of the official LongAlign code (commit 61a1021), as numbers.

Golden G1 (`g1_t5`) and G7. Relative L2 errors allowed are the golden files' own suggestion for
float32: 1e-5 for forward values, 5e-5 for gradients; 3e-7 is what another platform reached.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from segalign.text.adapter import TextAdapter
from segalign.text.joined_encoder import JoinedEncoder
from segalign.text.t5_encoder import T5Encoder

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden"
G1 = json.loads((GOLDEN / "g1_t5.json").read_text())
G7 = json.loads((GOLDEN / "g7_adapter.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "g1_t5.safetensors")


@pytest.fixture(scope="module")
def model():
    weights = {k: v.float() for k, v in load_file(GOLDEN / "g1_t5_encoder.safetensors").items()}
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    model = T5EncoderModel(T5Config(**G1["t5_config"])).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def tokenizer(tensors):
    """Rebuild the word tokenizer that the stored ids come from."""
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for caption, ids in zip(G1["captions"], tensors["input_ids"].tolist(), strict=True):
        vocab |= {w: i for w, i in zip(caption.split(), ids, strict=False) if i > 2}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def adapter():
    config = G7["config"]
    adapter = TextAdapter(config["in_dim"], config["int_dim"], config["out_dim"])
    stored = load_file(GOLDEN / "adapter.safetensors")
    adapter.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return adapter


@pytest.fixture(scope="module")
def g7():
    return load_file(GOLDEN / "g7_adapter.safetensors")


def t5_encoder(model, tokenizer, **settings):
    return T5Encoder(model, tokenizer, token_budget=G1["token_length"], **settings)


def relative_error(ours, golden):
    return ((ours.float() - golden.float()).norm() / golden.float().norm()).item()


def test_features_equal_the_official_ones(model, tokenizer, tensors):
    result = t5_encoder(model, tokenizer)(G1["captions"])
    golden = tensors["encoder_hidden_states"]
    assert result.prompt_embeds.shape == golden.shape == (3, 40, 48)
    for ours, theirs in zip(result.prompt_embeds, golden, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_masked_features_equal_the_stored_contrast(model, tokenizer, tensors):
    result = t5_encoder(model, tokenizer, attend_to_padding=False)(G1["captions"])
    golden = tensors["encoder_hidden_states_if_masked"]
    for ours, theirs in zip(result.prompt_embeds, golden, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_masking_changes_the_words_by_half_their_norm(model, tokenizer):
    official = t5_encoder(model, tokenizer)(G1["captions"])
    masked = t5_encoder(model, tokenizer, attend_to_padding=False)(G1["captions"])
    words = official.attention_mask
    difference = official.prompt_embeds[words] - masked.prompt_embeds[words]
    error = (difference.norm() / masked.prompt_embeds[words].norm()).item()
    assert error == pytest.approx(G1["rel_diff_real_tokens_if_mask_were_used"], abs=1e-5)


def test_ids_and_mask_equal_the_official_ones(model, tokenizer, tensors):
    encoder = t5_encoder(model, tokenizer)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    result = encoder(G1["captions"])
    hook.remove()
    assert torch.equal(torch.cat(seen), tensors["input_ids"].long())
    assert torch.equal(result.attention_mask, tensors["attention_mask"].bool())


def test_adapter_equals_the_official_one(adapter, g7):
    assert relative_error(adapter(g7["x"]), g7["y"]) < 1e-5


def test_adapter_gradients_equal_the_official_ones(adapter, g7):
    x = g7["x"].clone().requires_grad_()
    adapter(x).square().sum().backward()
    errors = {n: relative_error(p.grad, g7[f"grad.{n}"]) for n, p in adapter.named_parameters()}
    errors["x"] = relative_error(x.grad, g7["grad_x"])
    assert len(errors) == 13
    assert {name: error for name, error in errors.items() if error >= 5e-5} == {}


def test_adapter_in_bfloat16_equals_the_official_one(adapter, g7):
    ours = adapter.bfloat16()(g7["x"].bfloat16())
    assert ours.dtype == torch.bfloat16
    # Rounding each of some ten steps to 8 bits; the same platform gives the same bits.
    assert relative_error(ours, g7["y_bf16"]) < 2**-8


def test_adapter_keys_equal_the_official_ones(adapter):
    shapes = {name: list(tensor.shape) for name, tensor in adapter.state_dict().items()}
    assert shapes == G7["state_dict"]
    assert set(shapes) == set(load_file(GOLDEN / "adapter.safetensors"))


def test_the_t5_half_of_the_context_is_adapted_features(model, tokenizer, tensors, adapter):
    branch = t5_encoder(model, tokenizer, adapter=adapter)
    joined = JoinedEncoder([branch, branch])(G1["captions"])
    golden = adapter(tensors["encoder_hidden_states"])
    assert joined.prompt_embeds.shape == (3, 80, 32)
    assert relative_error(joined.prompt_embeds[:, 40:], golden) < 1e-5
