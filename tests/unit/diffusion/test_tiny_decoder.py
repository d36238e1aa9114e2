"""Tiny decoders: read as diffusers reads them, in the convention of codecs; their bias."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from segalign.diffusion.tiny_decoder import TinyDecoder, decoder_bias
from segalign.errors import ConfigError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderTiny(
            encoder_block_out_channels=(4,) * 4,
            decoder_block_out_channels=(4,) * 4,
            num_decoder_blocks=(1, 1, 1, 1),
            scaling_factor=0.5,
            shift_factor=0.25,
        )


@pytest.fixture
def folder(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def latents():
    return torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(1))


def test_a_folder_decodes_as_in_diffusers(autoencoder, folder, latents):
    decoder = TinyDecoder(model=str(folder)).load()
    with torch.no_grad():
        expected = (autoencoder.decode(latents / 0.5 + 0.25).sample + 1) / 2
    found = decoder.decode(latents)
    assert found.shape == (2, 3, 24, 16)
    torch.testing.assert_close(found, expected)


def test_scaled_latents_go_in_as_they_are(latents):
    """TAESD was trained on latents that the diffusion network sees: its factor is 1."""
    decoder = TinyDecoder(init="random").load()
    assert (decoder.scaling_factor, decoder.shift_factor) == (1, 0)
    expected = (decoder.network(latents) + 1) / 2
    assert torch.equal(decoder.decode(latents), expected)
    # Of the published shape: 1.2 million weights in the decoder.
    assert sum(p.numel() for p in decoder.parameters()) == 1_222_531


def test_it_is_frozen_and_differentiable(folder, latents):
    decoder = TinyDecoder(model=str(folder)).load()
    assert not any(p.requires_grad for p in decoder.parameters())
    assert not decoder.training
    decoder.double()
    leaf = latents[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(decoder.decode, leaf, fast_mode=True)


def test_images_have_the_precision_of_the_latents(folder, latents):
    decoder = TinyDecoder(model=str(folder), dtype="bfloat16").load()
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    found = decoder.decode(latents)
    assert found.dtype == torch.float32
    exact = TinyDecoder(model=str(folder)).load().decode(latents)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


def test_random_weights_depend_on_the_seed_alone(latents):
    state = torch.get_rng_state()
    one, again, other = (
        TinyDecoder(init="random", seed=s).load().decode(latents) for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_that_lacks_a_weight_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    name = "decoder.layers.0.weight"
    for broken in ({}, {name: torch.zeros(3)}):
        kept = {key: value for key, value in tensors.items() if key != name}
        save_file({**kept, **broken}, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"^expected the tiny decoder as config and .*; got "):
            TinyDecoder(model=str(folder)).load()


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b"{"), (WEIGHTS, b"\x00" * 20)],
)
def test_damage_is_one_line(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=r"^expected the tiny decoder as [^\n]*whole[^\n]*$"):
        TinyDecoder(model=str(folder)).load()


def test_a_pickle_in_place_of_the_weights_is_not_touched(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"^expected the tiny decoder as .*; got OSError: "):
        TinyDecoder(model=str(folder)).load()


def test_another_kind_of_autoencoder_is_refused(tmp_path):
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="got TypeError: the config of an `AutoencoderKL`; down"):
        TinyDecoder(model=str(tmp_path)).load()
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["_class_name"] == "AutoencoderKL"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("someone/absent-model", "^expected the tiny decoder `someone/absent-model` in the hub's"),
        ("no/such/folder", "^expected the tiny decoder at `no/such/folder`; there is no such"),
    ],
)
def test_an_absent_model_is_one_line(model, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        TinyDecoder(model=model).load()
    assert "\n" not in str(refusal.value)


def test_latents_of_another_model_are_refused():
    decoder = TinyDecoder(init="random").load()
    with pytest.raises(ConfigError, match=r"^expected latents of 4 channels .*; got 108; use"):
        decoder.decode(torch.zeros(1, 108, 6, 6))


def test_the_bias_is_the_angle_of_the_gradients(latents):
    """Losses that are linear in the latents, so that their gradients are known."""
    first, second = torch.zeros(2, 4, 3, 2), torch.zeros(2, 4, 3, 2)
    first[:, 0, 0, 0], second[0, 0, 0, 0], second[1, 1, 0, 0] = 2, 4, 3
    second[1, 0, 0, 0] = 4

    def linear(direction):
        return lambda latents, rows: (latents * direction[rows]).sum(dim=(1, 2, 3))

    rows = torch.tensor([1, 0])
    with torch.no_grad():
        found = decoder_bias(linear(first), linear(second), latents, rows)
    torch.testing.assert_close(found.cosine, torch.tensor([0.8, 1.0]))
    torch.testing.assert_close(found.norm_ratio, torch.tensor([2.5, 2.0]))
    same = decoder_bias(linear(first), linear(-first * 1e-15), latents, rows)
    torch.testing.assert_close(same.cosine, -torch.ones(2))
    none = decoder_bias(linear(first), linear(torch.zeros_like(first)), latents, rows)
    assert none.cosine.isnan().all()
    assert none.norm_ratio.eq(0).all()
    assert latents.grad is None
