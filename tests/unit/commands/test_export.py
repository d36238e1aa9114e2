"""``main.py export``: three formats, each read back by its own reader."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_run import STABLE_DIFFUSION, T5, model_settings, write_run

from lightning_modules.run_loading import load_module
from segalign.commands import export
from segalign.diffusion.pipeline_folder import merge_adapters
from segalign.errors import ConfigError
from segalign.formats.official_lora import match_official_lora, read_official_lora
from segalign.formats.peft_lora import lora_pairs
from segalign.text.adapter import load_adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    write_run(place / "run", model_settings(STABLE_DIFFUSION, lora={"rank": 2}, text=T5))
    return place


def run_export(place, kind, out, *options, source="run"):
    arguments = ["--checkpoint", str(place / source), "--format", kind, "--out", str(out)]
    return export.run([*arguments, *options], load_module)


def test_diffusers_takes_the_lora(place, tmp_path, capsys):
    assert run_export(place, "lora", tmp_path / "out", "--weights", "raw") == 0
    assert f"wrote lora to {tmp_path / 'out'}" in capsys.readouterr().out
    module = load_module(place / "run")
    plain = copy.deepcopy(module.unet)
    plain.unload_lora()
    models = module.text_models
    pipeline = StableDiffusionPipeline(
        module.codec.vae, models.text_model, models.tokenizer, plain, None, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path / "out")
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    with torch.no_grad(), module.weights("raw"):
        expected = module.unet(latents, 500, encoder_hidden_states=states).sample
        found = pipeline.unet(latents, 500, encoder_hidden_states=states).sample
    assert (found - expected).abs().max() <= 1e-5
    pipeline.unload_lora_weights()
    with torch.no_grad():
        without = pipeline.unet(latents, 500, encoder_hidden_states=states).sample
    assert (without - expected).abs().max() > 1e-3


def test_the_official_list_and_the_adapter_beside_it(place, tmp_path):
    assert run_export(place, "official-lora", tmp_path / "out", "--weights", "ema") == 0
    module = load_module(place / "run")
    tensors = read_official_lora(tmp_path / "out" / "lora_vis.pt")
    found = match_official_lora(tensors, merge_adapters(module.unet))
    with module.weights("ema"):
        expected = lora_pairs(module.unet)
        own = {n: t.clone() for n, t in module.text_models.t5.adapter.state_dict().items()}
    for layer, (up, down) in expected.items():
        assert torch.allclose(found[layer][0], up, rtol=1e-3, atol=1e-6)  # float16 in the file
        assert torch.allclose(found[layer][1], down, rtol=1e-3, atol=1e-6)
    stored = load_adapter(tmp_path / "out").state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in own.items())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "moving average" in text
    assert "`adapter/`" in text
    num_lora = sum(up.numel() + down.numel() for up, down in expected.values())
    assert f"LoRA ({num_lora:,} parameters), T5 adapter (" in text
    assert "- Special tokens: start keep, end drop, padding pad_star" in text


def test_trained_weights_are_not_dropped_silently(place, tmp_path):
    settings = model_settings(STABLE_DIFFUSION, lora={"rank": 2}, train_text_model=True)
    write_run(place / "text", settings, ema=False)
    for kind in ("lora", "official-lora"):
        message = rf"nothing but LoRA and a T5 adapter for `--format {kind}`.*`--format diffusers`"
        with pytest.raises(ConfigError, match=message):
            run_export(place, kind, tmp_path / "out", source="text")
    assert not (tmp_path / "out").exists()
    assert run_export(place, "diffusers", tmp_path / "out", source="text") == 0


def test_the_card_names_the_loras_that_the_base_holds(place, tmp_path):
    run_export(place, "lora", tmp_path / "first")
    assert "merged" not in (tmp_path / "first" / "README.md").read_text()
    base = {**STABLE_DIFFUSION, "init_args": {
        **STABLE_DIFFUSION["init_args"], "loras": [str(tmp_path / "first")],
    }}  # fmt: skip
    write_run(place / "second", model_settings(base, lora={"rank": 2}), ema=False)
    run_export(place, "official-lora", tmp_path / "out", source="second")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"over the base with these LoRAs merged: `{tmp_path / 'first'}`" in text


def test_what_cannot_be_exported(place, tmp_path):
    write_run(place / "whole", model_settings(), ema=False)
    with pytest.raises(ConfigError, match="trained LoRA for `--format lora`; it trained the whole"):
        run_export(place, "lora", tmp_path / "out", source="whole")
    with pytest.raises(ConfigError, match="the run keeps none"):
        run_export(place, "diffusers", tmp_path / "out", "--weights", "ema", source="whole")
    write_run(place / "toy", {"class_path": "toy_house.ToyModule"}, allow_import=["toy_house"])
    with pytest.raises(ConfigError, match=r"a text-to-image model in .*; got `ToyModule`"):
        run_export(place, "lora", tmp_path / "out", "--allow_import=toy_house", source="toy")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="has content"):
        run_export(place, "lora", tmp_path / "full")
    with pytest.raises(
        ConfigError, match=r"`--checkpoint` .*found nothing at .*00001000`, or .*best`"
    ):
        run_export(place, "lora", tmp_path / "out", source="nowhere")
