"""The official LoRA file against the official LongAlign code (commit 61a1021), as numbers.

Golden G6. The relative error allowed is 1e-5 in the L2 norm, the golden files' own suggestion for
float32 forward values. G3's text and image features prove that a scorer saved by transformers 4.41
is read right.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate, normalize

from segalign.diffusion.lora import LoraSettings
from segalign.formats.base_unet import unet_structure
from segalign.formats.clip_scorer import load_clip_scorer
from segalign.formats.lora_pairs import merge_lora
from segalign.formats.official_lora import (
    match_official_lora,
    official_targets,
    read_official_lora,
)
from segalign.formats.peft_lora import fill_lora

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden"
G6 = json.loads((GOLDEN / "g6_lora.json").read_text())
SD15_ORDER = json.loads((GOLDEN / "g6_sd15_order.json").read_text())["modules"]
G3 = json.loads((GOLDEN / "g3_scores.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "g6_lora_merged.safetensors")


@pytest.fixture
def unet():
    unet = UNet2DConditionModel(**G6["unet_config"]).eval().requires_grad_(False)
    stored = load_file(GOLDEN / "unet.safetensors")
    unet.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return unet


@pytest.fixture
def pairs(unet):
    tensors = read_official_lora(GOLDEN / "g6_lora_list.safetensors")
    return match_official_lora(tensors, unet)


def output(unet, golden):
    with torch.no_grad():
        return unet(golden["x"], golden["timesteps"], golden["encoder_hidden_states"]).sample


def relative_error(ours, golden):
    return ((ours - golden).norm() / golden.norm()).item()


def described(targets):
    return [
        {
            "module": target.path,
            "kind": {"linear": "Linear", "conv": "Conv2d"}[target.kind],
            "weight_shape": list(target.weight_shape),
        }
        for target in targets
    ]


def test_order_on_stable_diffusion_1_5_is_the_official_one():
    targets = official_targets(unet_structure("sd15"))
    assert len(targets) == 224
    assert described(targets) == SD15_ORDER


def test_order_does_not_change_under_peft_layers():
    unet = unet_structure("sd15")
    LoraSettings(rank=2).add_to(unet)
    assert described(official_targets(unet)) == SD15_ORDER


def test_positions_on_the_tiny_unet_are_the_official_ones(unet):
    index = [
        {
            "position": position,
            "module": target.path,
            "kind": described([target])[0]["kind"],
            "up": 2 * position,
            "down": 2 * position + 1,
            "up_shape": list(target.pair_shapes(G6["rank"])[0]),
            "down_shape": list(target.pair_shapes(G6["rank"])[1]),
        }
        for position, target in enumerate(official_targets(unet))
    ]
    assert index == G6["index"]


@pytest.mark.parametrize("times", [1, 2])
def test_merged_weights_equal_the_official_ones(unet, pairs, golden, times):
    merge_lora(unet, [pairs] * times)
    for path in G6["merged_modules"]:
        expected = golden[f"{'merged' if times == 1 else 'merged_twice'}.{path}.weight"]
        assert relative_error(unet.get_submodule(path).weight, expected) < 1e-5


def test_merged_output_equals_the_official_one(unet, pairs, golden):
    assert relative_error(output(unet, golden), golden["out_base"]) < 1e-5
    merge_lora(unet, pairs)
    assert relative_error(output(unet, golden), golden["out_merged"]) < 1e-5


def test_unmerged_output_equals_the_official_merged_one(unet, pairs, golden):
    LoraSettings(rank=G6["rank"]).add_to(unet)
    fill_lora(unet, pairs)
    assert relative_error(output(unet, golden), golden["out_merged"]) < 1e-5


def test_two_merges_in_bfloat16_round_once(unet, pairs):
    """The official code rounds after each merge, to 1 % of the update on this network."""
    reference = UNet2DConditionModel.from_config(unet.config)
    reference.load_state_dict(unet.bfloat16().state_dict())
    merge_lora(reference, [pairs, pairs])
    merge_lora(unet, [pairs, pairs])
    for path in pairs:
        merged, exact = (model.get_submodule(path).weight for model in (unet, reference))
        assert merged.dtype == torch.bfloat16
        assert torch.equal(merged, exact.bfloat16())


def test_scorer_of_transformers_4_gives_the_official_features(tmp_path):
    stored = load_file(GOLDEN / "scorer_clip.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    ids, rows = stored.pop(f"{name}.ids").long(), stored.pop(f"{name}.rows")
    stored[name] = torch.zeros(49408, rows.shape[1], dtype=rows.dtype)
    stored[name][ids] = rows
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "clip", **G3["scorer_config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    scorer, golden = load_clip_scorer(str(tmp_path)), load_file(GOLDEN / "g3_scores.safetensors")

    ids = scorer.tokenizer(G3["captions"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, golden["caption_input_ids"])
    settings = scorer.image_settings
    images = interpolate(
        golden["image_small"], (settings.image_size,) * 2, mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.mean, settings.std))
    with torch.no_grad():
        text = scorer.model.get_text_features(input_ids=ids).pooler_output
        image = scorer.model.get_image_features(pixel_values=(images - mean) / std).pooler_output
    for ours, key in ((text, "caption_text"), (image, "image_small")):
        expected = golden[f"{key}_features_normalised"]
        assert relative_error(normalize(ours, dim=-1), expected) < 1e-5
