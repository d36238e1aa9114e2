"""Stage 1 on every text context: what learns, what is saved, what is refused."""

import functools

import pytest
import torch

from lightning_modules.long_text_diffusion import LongTextDiffusionModule
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.pretrained import PretrainedModel
from segalign.diffusion.sampler import DDIMSampler
from segalign.errors import ConfigError
from segalign.scenes.base import ScenesBase
from segalign.text.settings import T5Branch, TextEncoding
from segalign.trainable import trainable_state_dict

CAPTIONS = ["A large red circle sits in the top left. The background is grey.", ""]
T5 = T5Branch(model="tiny", init="random", token_budget=40)


def stable_diffusion(dtype: str, lora: LoraSettings | None) -> LongTextDiffusionModule:
    made = LongTextDiffusionModule(
        base=PretrainedModel(init="random", size="tiny", dtype=dtype),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        text=TextEncoding(token_budget=64),
        lora=lora,
        sampler=DDIMSampler(num_inference_steps=2, guidance_scale=3.0),
    )
    made.configure_model()
    return made


def module(**text) -> LongTextDiffusionModule:
    made = LongTextDiffusionModule(
        base=ScenesBase(world="2x2", generator="random", text_model="random"),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        text=TextEncoding(token_budget=64, **text),
        lora=LoraSettings(rank=2),
        sampler=DDIMSampler(num_inference_steps=2, guidance_scale=2.0),
    )
    made.configure_model()
    return made


@pytest.mark.parametrize(
    ("context", "length"), [("clip", 64), ("t5", 40), ("clip+t5", 104)], ids=str
)
def test_contexts_have_their_lengths_and_make_images(context, length):
    made = module(context=context, t5=T5, mask_padding=True)
    text = made.conditioner(CAPTIONS)
    assert text.prompt_embeds.shape == (2, length, 64)
    images = made.generate(CAPTIONS, [0, 1], eval_seed=1)
    assert images.shape == (2, 3, 24, 24)
    assert not torch.equal(images, made.generate(CAPTIONS[::-1], [0, 1], eval_seed=1))


def test_the_adapter_learns_with_the_lora_and_t5_does_not():
    made = module(context="clip+t5", t5=T5)
    text = made.conditioner(CAPTIONS)
    noisy = torch.randn(2, 108, 4, 4)

    output = made.generator.predict(noisy, torch.tensor([900, 100]), text)
    output.square().sum().backward()
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    touched = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    adapter = {name for name in trained if ".adapter." in name}
    assert len(adapter) == 12
    assert adapter <= touched
    assert all("lora_" in name for name in trained - adapter)
    assert set(trainable_state_dict(made)) == trained


def test_a_frozen_adapter_stays():
    made = module(context="t5", t5=T5Branch(model="tiny", init="random", train_adapter=False))
    assert all("lora_" in name for name, p in made.named_parameters() if p.requires_grad)


def test_a_context_can_be_changed_for_a_block():
    made = module(context="clip+t5", t5=T5)
    whole = made.generator.conditioner
    with made.text_encoding(TextEncoding(kind="truncated")):
        assert made.generator.conditioner(CAPTIONS).prompt_embeds.shape == (2, 77, 64)
    assert made.generator.conditioner is whole


def test_t5_must_be_named():
    with pytest.raises(ConfigError, match=r"expected `text\.t5` for `text\.context: clip\+t5`"):
        module(context="clip+t5")


def test_another_adapter_width_is_refused(tmp_path):
    from segalign.text.adapter import TextAdapter, save_adapter

    save_adapter(TextAdapter(56, 32, 64), tmp_path / "adapter")
    branch = T5Branch(model="tiny", init="random", adapter=str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match="expected an adapter of input width"):
        module(context="t5", t5=branch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_over_a_base_of_any_precision_and_generates(dtype):
    made = stable_diffusion(dtype, LoraSettings(rank=2))
    latents = made.codec.encode(torch.rand(2, 3, 64, 64))
    text = made.generator.conditioner(CAPTIONS)
    losses = made._losses(0, latents, text, [(0, 0, 0), (0, 0, 1)])
    assert losses.dtype == torch.float32
    losses.sum().backward()
    touched = {n for n, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    # The second factor starts at zero, so the first one has no gradient yet.
    assert touched == {name for name in trained if "lora_B" in name}
    images = made.generate(CAPTIONS, [0, 1], eval_seed=1)
    assert images.shape == (2, 3, 64, 64)
    assert images.min() >= 0
    assert images.dtype == torch.float32


def test_training_bfloat16_weights_is_refused():
    with pytest.raises(ConfigError, match=r"expected trained weights in float32; `unet\."):
        stable_diffusion("bfloat16", None)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ({"kind": "truncated", "feature_store": "features"}, "feature_store"),
        ({"feature_store_2": "features"}, "feature_store_2"),
    ],
    ids=str,
)
def test_a_feature_store_that_nothing_reads_is_refused(text, name):
    with pytest.raises(ConfigError, match=rf"expected no `text\.{name}`, since nothing would read"):
        module(**text)


def test_the_cache_of_t5_can_be_off():
    branch = T5Branch(model="tiny", init="random", token_budget=40, cache_megabytes=0)
    made = module(context="t5", t5=branch)
    made.conditioner(CAPTIONS)
    assert made.text_models.t5.cached_bytes == 0


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, r"expected `lora\.rank` of at least 1; got 0"),
        ({"target_modules": "nothing"}, r"expected `lora\.target_modules` that match modules"),
    ],
    ids=str,
)
def test_lora_that_cannot_be_is_refused(lora, message):
    with pytest.raises(ConfigError, match=message):
        stable_diffusion("float32", LoraSettings(**lora))
