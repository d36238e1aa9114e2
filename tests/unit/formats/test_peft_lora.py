import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from segalign.errors import DataError
from segalign.formats.lora_pairs import merge_lora
from segalign.formats.official_lora import official_targets
from segalign.formats.peft_lora import (
    LORA_FILE,
    fill_lora,
    load_diffusers_lora,
    lora_pairs,
    save_diffusers_lora,
)
from segalign.text.tokenizer import clip_tokenizer


def pipeline(unet):
    text = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def same(first, second):
    assert set(first) == set(second)
    return all(
        torch.equal(a, b) for path in first for a, b in zip(first[path], second[path], strict=True)
    )


def test_diffusers_pipeline_loads_what_is_saved(tmp_path, peft_unet, make_unet, run_unet):
    save_diffusers_lora(lora_pairs(peft_unet), tmp_path)
    pipe = pipeline(make_unet())
    plain = run_unet(pipe.unet)
    pipe.load_lora_weights(str(tmp_path))
    expected = run_unet(peft_unet)
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(run_unet(pipe.unet), expected, rtol=0, atol=1e-5)
    pipe.fuse_lora()
    torch.testing.assert_close(run_unet(pipe.unet), expected, rtol=0, atol=1e-5)


def test_what_diffusers_saves_is_read(tmp_path, peft_unet, make_unet, run_unet):
    layers = {
        f"{path}.lora_{letter}.weight": part
        for path, (up, down) in lora_pairs(peft_unet).items()
        for letter, part in (("A", down), ("B", up))
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    plain = make_unet()
    merge_lora(plain, load_diffusers_lora(tmp_path, plain))
    torch.testing.assert_close(run_unet(plain), run_unet(peft_unet), rtol=0, atol=1e-5)


def test_pairs_merged_equal_the_adapter(peft_unet, make_unet, run_unet):
    plain = make_unet()
    merge_lora(plain, lora_pairs(peft_unet))
    torch.testing.assert_close(run_unet(plain), run_unet(peft_unet), rtol=0, atol=1e-5)


def test_pairs_come_in_official_order_and_own_their_memory(peft_unet):
    pairs, before = lora_pairs(peft_unet), copy.deepcopy(lora_pairs(peft_unet))
    assert list(pairs) == [target.path for target in official_targets(peft_unet)]
    for pair in pairs.values():
        for part in pair:
            part.zero_()
    assert same(lora_pairs(peft_unet), before)


def test_fill_is_the_inverse_of_taking(peft_unet, make_pairs):
    pairs = make_pairs(peft_unet, seed=9)
    fill_lora(peft_unet, pairs)
    assert same(lora_pairs(peft_unet), pairs)


def test_save_and_load(tmp_path, unet, make_pairs):
    pairs = make_pairs(unet)
    file = save_diffusers_lora(pairs, tmp_path / "new")
    assert file == tmp_path / "new" / LORA_FILE
    assert same(load_diffusers_lora(file, unet), pairs)
    assert same(load_diffusers_lora(file.parent, unet), pairs)


def test_scale_goes_into_the_pairs(tmp_path, make_unet, run_unet):
    unet, plain = make_unet(), make_unet()
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False)
    )
    pairs = lora_pairs(unet)
    save_diffusers_lora(pairs, tmp_path)
    pipe = pipeline(plain)
    pipe.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(run_unet(pipe.unet), run_unet(unet), rtol=0, atol=1e-5)
    fill_lora(unet, pairs)
    torch.testing.assert_close(run_unet(pipe.unet), run_unet(unet), rtol=0, atol=1e-5)


def test_scale_in_a_header_goes_into_the_pairs(tmp_path, make_unet, run_unet):
    unet, plain = make_unet(), make_unet()
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False)
    unet.add_adapter(config)
    unet.save_lora_adapter(tmp_path)
    named = load_file(tmp_path / LORA_FILE)
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 5})}
    save_file({f"unet.{k}": v for k, v in named.items()}, tmp_path / LORA_FILE, metadata=header)
    merge_lora(plain, load_diffusers_lora(tmp_path, plain))
    torch.testing.assert_close(run_unet(plain), run_unet(unet), rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", ["use_dora", "use_rslora"])
def test_header_of_another_kind_of_lora(tmp_path, unet, make_pairs, setting):
    file = save_diffusers_lora(make_pairs(unet), tmp_path)
    header = {"lora_adapter_metadata": json.dumps({f"unet.{setting}": True})}
    save_file(load_file(file), file, metadata=header)
    with pytest.raises(DataError, match=f"a LoRA with `{setting}`"):
        load_diffusers_lora(file, unet)


@pytest.mark.parametrize("header", ["{", "[]", '{"unet.lora_alpha": "x"}'])
def test_header_that_cannot_be_read(tmp_path, unet, make_pairs, header):
    file = save_diffusers_lora(make_pairs(unet), tmp_path)
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": header})
    with pytest.raises(DataError, match="a header that cannot be read"):
        load_diffusers_lora(file, unet)


@pytest.mark.parametrize("special", [{"use_dora": True}, {"lora_bias": True}])
def test_adapter_that_is_more_than_low_rank(unet, special):
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], **special))
    with pytest.raises(DataError, match="expected a plain LoRA, up times down"):
        lora_pairs(unet)


def test_network_without_an_adapter(unet, peft_unet):
    with pytest.raises(DataError, match="a LoRA adapter `other`; it has none"):
        lora_pairs(peft_unet, "other")


def test_adapter_of_other_rank_or_layers_is_left_alone(peft_unet, make_pairs):
    before = lora_pairs(peft_unet)
    with pytest.raises(DataError, match=r"expected a LoRA of rank 3.*got rank 2"):
        fill_lora(peft_unet, make_pairs(peft_unet, rank=2))
    fewer = make_pairs(peft_unet)
    name = min(fewer)
    del fewer[name]
    with pytest.raises(DataError, match=f"`{name}` is missing"):
        fill_lora(peft_unet, fewer)
    with pytest.raises(DataError, match=f"at layer `{name}`"):
        fill_lora(peft_unet, {**fewer, name: (torch.ones(1, 3), torch.ones(3, 1))})
    assert same(lora_pairs(peft_unet), before)


def test_files_of_another_layout_or_model(tmp_path, unet, make_unet, make_pairs):
    file = save_diffusers_lora(make_pairs(unet), tmp_path)
    named = load_file(file)
    with pytest.raises(DataError, match=r"at layer `.*attn2.to_[kv]`"):
        load_diffusers_lora(file, make_unet(cross_attention_dim=20))
    deeper = make_unet(
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    save_diffusers_lora(make_pairs(deeper), tmp_path / "deeper")
    with pytest.raises(DataError, match=r"it has no layer `down_blocks\.1\.attentions"):
        load_diffusers_lora(tmp_path / "deeper", unet)
    lost = min(named)
    save_file({k: v for k, v in named.items() if k != lost}, file)
    with pytest.raises(DataError, match="got half a pair of"):
        load_diffusers_lora(file, unet)
    save_file({**named, "unet.conv_in.alpha": torch.ones(1)}, file)
    with pytest.raises(DataError, match=r"the key `unet.conv_in.alpha`"):
        load_diffusers_lora(file, unet)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match="expected a safetensors file"):
        load_diffusers_lora(file, unet)
