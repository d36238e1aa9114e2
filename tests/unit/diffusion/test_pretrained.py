"""Models by hub id, folder or size; LoRA merged and trained in float32 over a bfloat16 base."""

import contextlib
import copy
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.model_sizes import SCHEDULER_CONFIG, random_parts
from segalign.diffusion.pretrained import PretrainedModel
from segalign.errors import ConfigError, DataError
from segalign.formats.official_lora import official_targets, write_official_lora
from segalign.formats.peft_lora import save_diffusers_lora
from segalign.text.tokenizer import clip_tokenizer

TINY = {"init": "random", "size": "tiny"}


@pytest.fixture(scope="module")
def base():
    """A tiny model in float32; tests copy what they change."""
    return PretrainedModel(**TINY).load()


def networks(bundle):
    """Name the networks of a bundle."""
    text = bundle.text_models
    found = {"unet": bundle.unet, "vae": bundle.codec.vae, "text": text.text_model}
    return found if text.text_model_2 is None else {**found, "text_2": text.text_model_2}


def dtypes(bundle):
    return {p.dtype for part in networks(bundle).values() for p in part.parameters()}


def save(parts, path):
    """Write a model in diffusers layout, in half precision as many published copies are."""
    parts.unet.half().save_pretrained(path / "unet")
    parts.vae.half().save_pretrained(path / "vae")
    parts.text_models.text_model.half().save_pretrained(path / "text_encoder")
    parts.text_models.tokenizer.save_pretrained(path / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(path / "scheduler")
    return path


def tiny_parts(seed=0):
    return random_parts("tiny", seed=seed, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_parts(), tmp_path_factory.mktemp("sd"))


def test_random_weights_depend_on_the_seed_alone(base):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = PretrainedModel(**TINY).load(), PretrainedModel(**TINY, seed=1).load()
    assert torch.equal(torch.get_rng_state(), state)
    for name, part in networks(base).items():
        for key, value in part.named_parameters():
            assert torch.equal(value, networks(again)[name].get_parameter(key))
            different = not torch.equal(value, networks(other)[name].get_parameter(key))
            assert different == (value.dim() > 1), key


def test_random_weights_are_those_of_fresh_layers(base):
    weight = base.unet.mid_block.resnets[0].conv1.weight
    bound = (weight[0].numel()) ** -0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    norm = base.unet.mid_block.resnets[0].norm1
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
    # What is no parameter has been made as usual.
    assert base.text_models.text_model.embeddings.position_ids.tolist() == [list(range(77))]


def test_a_random_model_makes_images(base):
    bundle = base
    latents = bundle.codec.encode(torch.rand(1, 3, 64, 64))
    assert latents.shape == (1, 4, 8, 8)
    assert bundle.image_size == 64
    states = bundle.text_models.text_model(torch.tensor([[49406, 320, 49407]])).last_hidden_state
    output = bundle.unet(latents, 3, encoder_hidden_states=states).sample
    images = bundle.codec.decode(output)
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()
    assert images.std() > 1e-3
    assert bundle.schedule.prediction_type == "epsilon"
    assert bundle.schedule.num_timesteps == 1000


def test_on_the_meta_device_there_are_shapes_alone():
    bundle = PretrainedModel(**TINY, dtype="bfloat16").load("meta")
    assert all(p.is_meta for part in networks(bundle).values() for p in part.parameters())
    assert not bundle.schedule.alphas_cumprod.is_meta


def test_a_folder_is_read_in_the_wanted_precision(folder):
    bundle = PretrainedModel(model=str(folder)).load()
    assert dtypes(bundle) == {torch.float32}
    drawn = tiny_parts().unet.conv_in.weight.half().float()
    assert torch.equal(bundle.unet.conv_in.weight, drawn)
    assert bundle.text_models.text_model_2 is None
    assert dtypes(PretrainedModel(model=str(folder), dtype="bfloat16").load()) == {torch.bfloat16}


def test_two_towers_are_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=24, bos_token_id=49406, eos_token_id=49407, vocab_size=49408,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "text_encoder_2")
    clip_tokenizer(pad_token="!").save_pretrained(tmp_path / "tokenizer_2")
    text = PretrainedModel(model=str(tmp_path), dtype="bfloat16").load().text_models
    assert text.text_model_2.text_projection.weight.shape == (24, 16)
    assert text.text_model_2.text_projection.weight.dtype == torch.bfloat16
    assert text.tokenizer_2.pad_token_id == 0
    assert text.tokenizer.pad_token_id == 49407
    shutil.rmtree(tmp_path / "tokenizer_2")
    incomplete = pytest.raises(ConfigError, match=r"with a folder `tokenizer_2/` at")
    with incomplete:
        PretrainedModel(model=str(tmp_path)).load()
    # The index decides, if there is one.
    index = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with incomplete:
        PretrainedModel(model=str(tmp_path)).load()
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder_2": [None, None]}))
    assert PretrainedModel(model=str(tmp_path)).load().text_models.text_model_2 is None


@pytest.mark.parametrize(
    ("part", "file", "content"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", None),
        ("vae", "config.json", b"{"),
        ("text_encoder", "model.safetensors", b"\x00" * 20),
        ("scheduler", "scheduler_config.json", b"[]"),
    ],
)
def test_a_damaged_part_is_one_line(folder, tmp_path, part, file, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / part / file
    path.unlink() if content is None else path.write_bytes(content)
    if content is None:
        # A pickle in its place is not touched.
        (tmp_path / part / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    expected = (
        rf"^expected the text-to-image model's `{part}` as config and safetensors at `[^\n]*$"
    )
    with pytest.raises(ConfigError, match=expected):
        PretrainedModel(model=str(tmp_path)).load()


def test_a_weight_that_a_file_lacks_is_not_drawn(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for part, file in (("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
        path = tmp_path / part / f"{file}.safetensors"
        tensors = load_file(path)
        name = next(iter(tensors))
        save_file({**tensors, name: torch.zeros(3)}, path, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=rf"`{part}` as .*; got "):
            PretrainedModel(model=str(tmp_path)).load()
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=rf"`{part}` as .* no weight of .* for `{name}`; "):
            PretrainedModel(model=str(tmp_path)).load()
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "someone/absent-model",
            r"^expected the text-to-image model `someone/absent-model` in the ",
        ),
        ("no/such/folder", r"^expected the text-to-image model at `no/such/folder`; there is no "),
    ],
)
def test_an_absent_model_is_one_line(model, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        PretrainedModel(model=model).load()
    assert "\n" not in str(caught.value)


def random_lora(unet, rank=2, size=1.0, seed=0):
    """Draw a LoRA of the official layers."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {target.path: target.pair_shapes(rank) for target in official_targets(unet)}
    return {
        path: tuple(torch.randn(shape, generator=draw).half().float() * size for shape in pair)
        for path, pair in shapes.items()
    }


def test_loras_of_both_formats_are_merged_in_float32_and_rounded_once(base, tmp_path):
    plain = base.unet
    # Each alone is at most half a step of bfloat16 for most weights; only their sum is not.
    first, second = random_lora(plain, size=0.01), random_lora(plain, size=0.01, seed=1)
    write_official_lora(first, plain, tmp_path / "lora_vis.pt")
    save_diffusers_lora(second, tmp_path / "second")
    loras = [str(tmp_path / "lora_vis.pt"), str(tmp_path / "second")]
    merged = PretrainedModel(**TINY, dtype="bfloat16", loras=loras).load().unet
    for path in first:
        weight = plain.get_submodule(path).weight
        update = sum(
            (up.half().float() if pairs is first else up).flatten(1)
            @ (down.half().float() if pairs is first else down).flatten(1)
            for pairs in (first, second)
            for up, down in [pairs[path]]
        )
        expected = (weight + update.reshape(weight.shape)).bfloat16()
        assert torch.equal(merged.get_submodule(path).weight, expected), path
        assert not torch.equal(expected, weight.bfloat16()), path
    untouched = "down_blocks.0.attentions.0.proj_in"
    weight = plain.get_submodule(untouched).weight.bfloat16()
    assert torch.equal(merged.get_submodule(untouched).weight, weight)


def lora_weights(unet):
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


def bf16_base_with_lora(base, rank=4):
    unet = torch.nn.Module.to(copy.deepcopy(base.unet), dtype=torch.bfloat16)
    LoraSettings(rank=rank).add_to(unet)
    return unet


def test_adapters_are_float32_over_a_bfloat16_base(base):
    unet = bf16_base_with_lora(base)
    trained = lora_weights(unet)
    layers = [m for m in unet.modules() if isinstance(m, LoraLayer)]
    assert len(trained) == 2 * len(layers) == 2 * len(official_targets(unet))
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = [p for p in unet.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    first = torch.cat([p.flatten() for name, p in trained.items() if "lora_A" in name]).detach()
    assert first.std().item() == pytest.approx(1 / 4, rel=0.05)
    # Not rounded by the way.
    assert (first.bfloat16().float() != first).float().mean() > 0.9
    assert all(p.eq(0).all() for name, p in trained.items() if "lora_B" in name)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1.0), (torch.bfloat16, 0.5)])
def test_adamw_moves_float32_adapters_and_leaves_bfloat16_ones(base, dtype, expected):
    # The second case is what the official code does, and why the first is the rule here.
    unet = bf16_base_with_lora(base, rank=32)
    trained = [p for name, p in lora_weights(unet).items() if "lora_A" in name]
    for weight in trained:
        weight.data = weight.data.to(dtype)
    before = [weight.detach().clone() for weight in trained]
    optimizer = torch.optim.AdamW(trained, lr=3e-5)
    for _ in range(10):
        for weight in trained:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    moves = [(old - new).detach().float() for old, new in zip(before, trained, strict=True)]
    moved = torch.cat([move.flatten() for move in moves])
    share = (moved != 0).float().mean().item()
    if dtype == torch.float32:
        assert share == expected
        assert torch.allclose(moved, torch.full_like(moved, 3e-4), rtol=0.01)
    else:
        assert share < expected


@pytest.mark.parametrize("autocast", [True, False])
def test_float32_adapters_work_over_a_bfloat16_base(base, autocast):
    unet = bf16_base_with_lora(base)
    torch.manual_seed(0)
    for weight in lora_weights(unet).values():
        weight.data.normal_(std=0.05)
    inputs = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    # Autocast takes float32 inputs as training gives them; without it they have the base's dtype.
    dtype = torch.float32 if autocast else torch.bfloat16
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        output = unet(inputs[0].to(dtype), 500, encoder_hidden_states=inputs[1].to(dtype)).sample
    output.float().square().mean().backward()
    grads = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    assert grads.keys() == lora_weights(unet).keys()
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads.values())
    wide = copy.deepcopy(base.unet)
    LoraSettings(rank=4).add_to(wide)
    wide.load_state_dict({name: value.float() for name, value in unet.state_dict().items()})
    expected = wide(inputs[0], 500, encoder_hidden_states=inputs[1]).sample
    error = (output.float() - expected).norm() / expected.norm()
    assert error < 0.03  # bfloat16 has 8 bits


@pytest.mark.parametrize("kind", ["official", "diffusers"])
def test_adapters_can_start_from_a_file(base, tmp_path, kind):
    unet = copy.deepcopy(base.unet)
    pairs = random_lora(unet)
    source = tmp_path / "lora"
    if kind == "official":
        write_official_lora(pairs, unet, source)
    else:
        save_diffusers_lora(pairs, source)
    with pytest.raises(DataError, match=r"rank"):
        LoraSettings(rank=3, init_from=str(source)).add_to(copy.deepcopy(base.unet))
    LoraSettings(rank=2, init_from=str(source)).add_to(unet)
    for path, (up, down) in pairs.items():
        layer = unet.get_submodule(path)
        assert torch.equal(layer.lora_B["default"].weight, up)
        assert torch.equal(layer.lora_A["default"].weight, down)
        assert layer.lora_A["default"].weight.requires_grad


def test_an_absent_lora_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"^expected a LoRA file at `.*none`; there is none; "):
        PretrainedModel(**TINY, loras=[str(tmp_path / "none")]).load()


def gradients(**settings):
    unet = PretrainedModel(**TINY, **settings).load().unet
    torch.manual_seed(0)
    LoraSettings(rank=2).add_to(unet)
    calls = []
    unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    output = unet(torch.ones(1, 4, 8, 8), 5, encoder_hidden_states=torch.ones(1, 3, 32)).sample
    output.square().mean().backward()
    grads = {n: p.grad for n, p in unet.named_parameters() if p.requires_grad and "lora_B" in n}
    return grads, len(calls)


def test_checkpointing_and_layout_change_cost_but_not_gradients():
    plain, num_calls = gradients()
    assert num_calls == 1
    for settings, calls in (({"gradient_checkpointing": True}, 2), ({"channels_last": True}, 1)):
        found, num_calls = gradients(**settings)
        assert num_calls == calls
        for name, grad in plain.items():
            assert torch.allclose(found[name], grad, rtol=1e-4, atol=1e-6), name


def test_channels_last_reaches_the_weights():
    bundle = PretrainedModel(**TINY, channels_last=True).load()
    for layer in (bundle.unet.conv_in, bundle.codec.vae.encoder.conv_in):
        weight = layer.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_random_schedule_is_that_of_stable_diffusion():
    alphas = PretrainedModel(**TINY).load("meta").schedule.alphas_cumprod
    reference = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod
    assert torch.allclose(alphas.float(), reference, rtol=1e-4)
    assert alphas[-1].item() == pytest.approx(0.0047, abs=5e-5)
