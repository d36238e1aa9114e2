"""Rollouts: the lean calls give what the plain ones do, and leave the network as it is."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.guidance import Guidance
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.merged_lora import merge_layer, merged_weight
from segalign.diffusion.rollout import Rollout, RolloutSettings
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError
from segalign.sharding import shard_backbone
from segalign.text.conditioning import TextConditioning, TextReport

BATCH, BUDGET, WIDTH = 2, 12, 12
EVERYTHING = {"merge_lora": True, "cache_text": True, "pair_guidance": True}
NOTHING = {"merge_lora": False, "cache_text": False, "pair_guidance": False}
EACH = [{name: value} for name, value in EVERYTHING.items()]
GUIDANCE = Guidance(scale=7.5, interval=(200, 999))
TIMESTEPS = (900, 500, 100)


def make_unet(rank=2, dtype=torch.float64, pooled=False):
    torch.manual_seed(0)
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": 6 + 6 * 4} if pooled else {}  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=WIDTH, attention_head_dim=2,
        **sizes,
    )  # fmt: skip
    torch.nn.Module.to(unet, dtype)
    if rank:
        LoraSettings(rank=rank).add_to(unet)
        change_adapters(unet)
    return unet.train()


def change_adapters(unet):
    """Move the adapters, in float64 where the network is."""
    with torch.no_grad():
        for layer in unet.modules():
            if isinstance(layer, LoraLayer):
                for weight in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                    if unet.dtype == torch.float64:
                        weight.data = weight.double()
                    weight += 0.2 * torch.randn_like(weight)


def make_generator(unet, mask_padding=True):
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear"})
    return TextToImage(unet, None, None, schedule, image_size=4, mask_padding=mask_padding)


def make_text(seed, lengths=(9, 5), *, pooled=False, trimmed=True):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(BUDGET) < torch.tensor(lengths)[:, None]
    embeds = torch.randn(len(lengths), BUDGET, WIDTH, generator=draw)
    vectors = torch.randn(len(lengths), 6, generator=draw) if pooled else None
    ones, none = (1,) * len(lengths), (0,) * len(lengths)
    report = TextReport(ones, none, none, tuple(lengths))
    return TextConditioning(embeds, mask, vectors, report, max(lengths) if trimmed else None)


def plain(generator, positive, negative, guidance=GUIDANCE):
    """Two calls of the network at each step."""

    def denoise(latents, timestep):
        at = torch.tensor(timestep)
        output = generator.predict(latents, at, positive)
        if not guidance.is_active(timestep, 1000):
            return output
        return guidance.combine(output, generator.predict(latents, at, negative))

    return denoise


@pytest.fixture(scope="module")
def unet():
    """A network with adapters; tests leave it as it is."""
    return make_unet()


@pytest.fixture
def latents():
    return torch.randn(BATCH, 4, 4, 4, generator=torch.Generator().manual_seed(5)).double()


TEXTS = {
    "masked": (True, make_text(1), make_text(2, (3, 3))),
    "no leading": (True, make_text(1, trimmed=False), make_text(2, (3, 3), trimmed=False)),
    "unmasked": (False, make_text(1), make_text(2, (3, 3))),
    "no tokens": (True, make_text(1), make_text(2, (3, 0))),
    "negative expanded": (True, make_text(1), make_text(2, (3,)).expand(BATCH)),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("settings", [NOTHING, *({**NOTHING, **one} for one in EACH), EVERYTHING])
def test_every_saving_gives_what_two_plain_calls_do(settings, text, unet, latents):
    mask_padding, positive, negative = text
    generator = make_generator(unet, mask_padding)
    with torch.no_grad():
        expected = [plain(generator, positive, negative)(latents, t) for t in TIMESTEPS]
    rollout = Rollout(generator, RolloutSettings(**settings))
    with rollout.denoiser(positive, negative, GUIDANCE) as denoise:
        found = [denoise(latents, t) for t in TIMESTEPS]
    assert not any(output.requires_grad for output in found)
    for output, wanted in zip(found, expected, strict=True):
        assert torch.linalg.norm(output - wanted) <= 1e-12 * torch.linalg.norm(wanted)


def test_single_precision_agrees_to_rounding(latents):
    generator = make_generator(make_unet(dtype=torch.float32))
    positive, negative = make_text(1), make_text(2, (3, 3))
    rollout = Rollout(generator, RolloutSettings(cache_text=True))
    for guidance in (Guidance(), GUIDANCE):
        with torch.no_grad():
            expected = plain(generator, positive, negative, guidance)(latents.float(), 500)
            size = generator.predict(latents.float(), torch.tensor(500), positive).norm()
        with rollout.denoiser(positive, negative, guidance) as denoise:
            error = torch.linalg.norm(denoise(latents.float(), 500) - expected)
        # Of the terms, w and w - 1 times an output: their difference is smaller than they are.
        assert 0 < error <= 1e-6 * (2 * guidance.scale - 1) * size


def test_added_conditions_of_sdxl_go_in_pairs(latents):
    generator = make_generator(make_unet(pooled=True), mask_padding=False)
    positive, negative = make_text(1, pooled=True), make_text(2, (3, 3), pooled=True)
    with torch.no_grad():
        expected = plain(generator, positive, negative)(latents, 500)
    rollout = Rollout(generator, RolloutSettings(**EVERYTHING))
    with rollout.denoiser(positive, negative, GUIDANCE) as denoise:
        error = torch.linalg.norm(denoise(latents, 500) - expected)
    assert error <= 1e-12 * torch.linalg.norm(expected)


def test_calls_have_the_rows_and_the_text_is_projected_once(unet, latents, monkeypatch):
    rows, projected = [], []
    watched = [
        unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))),
        *(module.get_base_layer().register_forward_hook(lambda *_: projected.append(1))
          for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))),
    ]  # fmt: skip
    rollout = Rollout(make_generator(unet), RolloutSettings(cache_text=True))
    with rollout.denoiser(make_text(1), make_text(2, (3, 3)), GUIDANCE) as denoise:
        for timestep in TIMESTEPS:
            denoise(latents, timestep)
    assert rows == [2 * BATCH, 2 * BATCH, BATCH]
    assert len(projected) == len(watched) - 1 == 6
    for handle in watched:
        handle.remove()


def test_text_is_never_that_of_another_batch(unet, latents):
    """Foreign text in the block, and the next block's own, are seen as they are."""
    generator, negative = make_generator(unet), make_text(2, (3, 3))
    rollout = Rollout(generator, RolloutSettings(**EVERYTHING))
    for seed in (1, 3):
        positive = make_text(seed)
        expected = plain(generator, positive, negative)(latents, 500)
        with rollout.denoiser(positive, negative, GUIDANCE) as denoise:
            denoise(latents, 500)
            other = generator.predict(latents, torch.tensor(500), make_text(9))
            assert torch.allclose(denoise(latents, 500), expected, rtol=1e-11, atol=1e-11)
        assert torch.equal(other, generator.predict(latents, torch.tensor(500), make_text(9)))


def test_any_attention_processor_is_served(latents):
    network = make_unet()
    network.set_attn_processor(AttnProcessor())
    generator, positive, negative = make_generator(network), make_text(1), make_text(2, (3, 3))
    expected = plain(generator, positive, negative)(latents, 500)
    rollout = Rollout(generator, RolloutSettings(**EVERYTHING))
    with rollout.denoiser(positive, negative, GUIDANCE) as denoise:
        assert torch.allclose(denoise(latents, 500), expected, rtol=1e-11, atol=1e-11)


def gradients(generator, latents, text):
    output = generator.predict(latents, torch.tensor(500), text)
    weights = [weight for weight in generator.unet.parameters() if weight.requires_grad]
    return torch.autograd.grad((output * latents).sum(), weights)


def test_gradients_can_be_taken_between_calls(unet, latents):
    """The graph of a call before, a call between, and the backward pass of both."""
    generator, positive = make_generator(unet), make_text(1)
    expected = gradients(generator, latents, positive)
    rollout = Rollout(generator, RolloutSettings(**EVERYTHING))
    with rollout.denoiser(positive, make_text(2, (3, 3)), GUIDANCE) as denoise:
        denoise(latents, 900)
        output = generator.predict(latents, torch.tensor(500), positive)
        denoise(latents, 500)
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        found = torch.autograd.grad((output * latents).sum(), weights)
        again = gradients(generator, latents, positive)
    assert len(found) == len(expected) > 0
    for one, two, three in zip(found, again, expected, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(two, three)


def test_a_release_gives_the_memory_back_before_the_block_ends(unet, latents):
    positive = make_text(1)
    positive = replace(positive, prompt_embeds=positive.prompt_embeds.float())  # cast for float64
    rollout = Rollout(make_generator(unet), RolloutSettings(**EVERYTHING))
    with rollout.denoiser(positive, make_text(2, (3, 3)), GUIDANCE) as denoise:
        denoise(latents, 500)
        held = [
            *(weakref.ref(stand_in.weight) for stand_in in rollout._lora._stand_ins.values()),
            *(weakref.ref(tensor) for stand_in in rollout._cache._stand_ins.values()
              for pair in stand_in.known for tensor in pair),
        ]  # fmt: skip
        assert len(held) > 20
        assert all(one() is not None for one in held)
        denoise.release()
        assert all(one() is None for one in held)
        denoise.release()
        with pytest.raises(RuntimeError, match="expected a call before the rollout's release"):
            denoise(latents, 500)
        with pytest.raises(RuntimeError, match="one rollout at a time"):
            rollout.denoiser(positive, None, Guidance()).__enter__()
    with rollout.denoiser(positive, None, Guidance()) as denoise:
        denoise(latents, 500)


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_is_left_exactly_as_it_was(fails, unet, latents, monkeypatch):
    modules = dict(unet.named_modules())
    processors = dict(unet.attn_processors)
    before = {name: (weight, weight.detach().clone(), weight.requires_grad, weight._version)
              for name, weight in unet.named_parameters()}  # fmt: skip
    rollout = Rollout(make_generator(unet), RolloutSettings(**EVERYTHING))

    def run():
        with rollout.denoiser(make_text(1), make_text(2, (3, 3)), GUIDANCE) as denoise:
            denoise(latents, 500)
            if fails:
                monkeypatch.setattr(unet.conv_out, "forward", lambda _: 1 / 0)
                denoise(latents, 100)

    if fails:
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    assert dict(unet.named_modules()) == modules
    assert unet.attn_processors == processors
    for name, weight in unet.named_parameters():
        was, value, requires_grad, version = before[name]
        assert weight is was
        assert torch.equal(weight, value)
        assert (weight.requires_grad, weight._version) == (requires_grad, version)
    # The memory is given back.
    assert not any(stand_in.known for stand_in in rollout._cache._stand_ins.values())
    for layer, stand_in in rollout._lora._stand_ins.items():
        assert stand_in.weight is layer.get_base_layer().weight
    assert not any(layer.merged or layer.disable_adapters
                   for layer in unet.modules() if isinstance(layer, LoraLayer))  # fmt: skip


@pytest.mark.parametrize("is_released", [True, False])
def test_sharded_weights_are_whole_no_longer_than_there_are_calls(is_released, mesh, latents):
    network = make_unet(dtype=torch.float32, rank=0)
    shard_backbone(network, mesh)
    rollout = Rollout(make_generator(network), RolloutSettings())

    def num_whole():
        return sum(not isinstance(weight, DTensor) for weight in network.parameters())

    with rollout.denoiser(make_text(1), None, Guidance()) as denoise:
        denoise(latents.float(), 500)
        assert num_whole() == len(list(network.parameters()))
        if is_released:
            denoise.release()
            assert num_whole() == 0
            # Of calls with gradient, and of the reference, too.
            rollout._generator.predict(latents.float(), torch.tensor(500), make_text(1))
            assert num_whole() == 0
    assert num_whole() == 0


def test_adapters_are_merged_anew_for_every_rollout(latents):
    network = make_unet()
    generator, positive, negative = make_generator(network), make_text(1), make_text(2, (3, 3))
    rollout = Rollout(generator, RolloutSettings(**EVERYTHING))
    found = []
    for _ in range(2):
        with torch.no_grad():
            expected = plain(generator, positive, negative)(latents, 500)
        with rollout.denoiser(positive, negative, GUIDANCE) as denoise:
            found.append(denoise(latents, 500))
        assert torch.allclose(found[-1], expected, rtol=1e-11, atol=1e-11)
        change_adapters(network)
    assert (found[1] - found[0]).abs().max() > 1e-2


def test_disabled_adapters_and_none_at_all(latents):
    network, positive = make_unet(), make_text(1)
    network.disable_adapters()
    for each in (network, make_unet(rank=0)):
        generator = make_generator(each)
        with torch.no_grad():
            expected = generator.predict(latents, torch.tensor(500), positive)
        rollout = Rollout(generator, RolloutSettings(merge_lora=True))
        with rollout.denoiser(positive, None, Guidance()) as denoise:
            assert torch.equal(denoise(latents, 500), expected)


def test_low_precision_is_merged_on_demand_alone_and_from_float32(latents):
    """Adapters whose update the base's precision would lose stay apart by default."""
    network = make_unet(dtype=torch.bfloat16)
    generator, positive = make_generator(network), make_text(1)
    at = torch.tensor(500)
    with torch.no_grad():
        expected = generator.predict(latents.float(), at, positive)
    with Rollout(generator, RolloutSettings()).denoiser(positive, None, Guidance()) as denoise:
        assert torch.equal(denoise(latents.float(), 500), expected)
    settings = RolloutSettings(merge_lora=True)
    with Rollout(generator, settings).denoiser(positive, None, Guidance()) as denoise:
        merged = denoise(latents.float(), 500)
    assert 0 < (merged - expected).norm() < 0.05 * expected.norm()
    layer = next(layer for layer in network.modules() if isinstance(layer, LoraLayer))
    base, up, down = (
        layer.base_layer.weight,
        *(part["default"].weight.double().flatten(1) for part in (layer.lora_B, layer.lora_A)),
    )
    exact = base.double() + (up @ down).reshape(base.shape)
    # Half a last place of bfloat16, and no more, is what one rounding costs.
    error = (merged_weight(layer).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 * (1 + 1e-3) + 1e-30).all()


def test_merging_is_not_rounded_by_autocast_nor_done_twice():
    network = make_unet(dtype=torch.float32)
    layer = next(layer for layer in network.modules() if isinstance(layer, LoraLayer))
    expected = merged_weight(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged_weight(layer), expected)
    merge_layer(layer)
    assert torch.equal(layer.get_base_layer().weight, expected)
    other = next(each for each in network.modules() if isinstance(each, LoraLayer) if each != layer)
    other.merge()
    once = other.get_base_layer().weight.clone()
    merge_layer(other)
    assert torch.equal(other.get_base_layer().weight, once)


def test_autocast_is_that_of_the_calls(latents):
    generator = make_generator(make_unet(dtype=torch.float32))
    positive, negative = make_text(1), make_text(2, (3, 3))
    rollout = Rollout(generator, RolloutSettings(merge_lora=False, cache_text=True))
    at_bfloat16 = torch.autocast("cpu", torch.bfloat16)
    with rollout.denoiser(positive, negative, GUIDANCE) as denoise, at_bfloat16, torch.no_grad():
        expected = plain(generator, positive, negative)(latents.float(), 500)
        found = denoise(latents.float(), 500)
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_compiled_blocks_agree_and_are_not_stale(latents):
    network = make_unet(dtype=torch.float32)
    plain_generator = make_generator(copy.deepcopy(network))
    positive, negative = make_text(1), make_text(2, (3, 3))
    settings = RolloutSettings(compile="regional", compile_backend="eager", cache_text=True)
    compiled = Rollout(make_generator(network), settings)
    guidance, seen = Guidance(scale=2.0), []
    for seed in range(2):
        for each in (network, plain_generator.unet):
            torch.manual_seed(seed)
            change_adapters(each)
        with torch.no_grad():
            expected = plain(plain_generator, positive, negative, guidance)(latents.float(), 500)
        with compiled.denoiser(positive, negative, guidance) as denoise:
            error = denoise(latents.float(), 500) - expected
        assert error.norm() <= 1e-5 * expected.norm()
        seen.append(expected)
    assert (seen[1] - seen[0]).norm() > 1e-2 * seen[0].norm()
    blocks = [module for module in network.modules() if module._compiled_call_impl is not None]
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock", "ResnetBlock2D"}
    calls = [block._compiled_call_impl for block in blocks]
    Rollout(make_generator(network), settings)
    assert [block._compiled_call_impl for block in blocks] == calls


def test_misuse_is_named(unet, latents):
    rollout = Rollout(make_generator(unet), RolloutSettings())
    with pytest.raises(ConfigError, match=r"a negative prompt for guidance of 7\.5; got none"):
        rollout.denoiser(make_text(1), None, GUIDANCE).__enter__()
    with rollout.denoiser(make_text(1), None, Guidance()) as denoise:
        with pytest.raises(RuntimeError, match="one rollout at a time"):
            rollout.denoiser(make_text(1), None, Guidance()).__enter__()
        denoise(latents, 500)
    with pytest.raises(RuntimeError, match="it has ended"):
        denoise(latents, 500)
    with pytest.raises(ConfigError, match=r"`compile` must be one of `none`, .*; got 'fast'"):
        RolloutSettings(compile="fast")
