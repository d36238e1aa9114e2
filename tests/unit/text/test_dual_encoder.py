import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet

from segalign.errors import ConfigError
from segalign.text.dual_encoder import DualEncoder, TruncatedDualEncoder
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.tokenizer import clip_tokenizer

SHORT = ["A red cat sleeps on the mat.", "", "A dog."]
CAPTIONS = [
    "",
    "A red cat sleeps.",
    "A red cat sleeps. A blue dog, e.g. a poodle, runs 3.5 metres. The sky is grey.",
    "The sky is grey. " * 40,
    "red apples, green pears, " * 30,
    "What a day! A red cat!",
]


@pytest.fixture(scope="module")
def tokenizer_2():
    return clip_tokenizer("!")


@pytest.fixture
def models(text_model, tokenizer, projecting_model, tokenizer_2):
    return text_model, tokenizer, projecting_model, tokenizer_2


@pytest.fixture
def pipeline(models):
    """A random Stable Diffusion XL, of which only the text side is run."""
    text_model, tokenizer, text_model_2, tokenizer_2 = models
    blocks = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet(
        **blocks,
        cross_attention_dim=72,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=48,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**blocks),
        text_encoder=text_model,
        text_encoder_2=text_model_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def close(a, b, atol=5e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_truncated_encoding_is_that_of_the_pipeline(models, pipeline):
    encoder = TruncatedDualEncoder(*models)
    captions = [*SHORT, "a red cat and a blue dog " * 20]
    result, empty = encoder(captions), encoder.encode_empty(len(captions))
    embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(
        captions, device="cpu"
    )
    assert result.prompt_embeds.shape == (4, 77, 32 + 40) == (4, 77, encoder.width)
    close(result.prompt_embeds, embeds)
    close(result.pooled, pooled, 2e-5)
    close(empty.prompt_embeds, negative_embeds, 0)
    close(empty.pooled, negative_pooled, 0)
    assert result.report.dropped_tokens == (0, 0, 0, 65)


def test_the_encoded_empty_caption_is_a_choice(models, pipeline):
    encoder = TruncatedDualEncoder(*models, force_zeros_for_empty_prompt=False)
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    _, negative_embeds, _, negative_pooled = pipeline.encode_prompt("A cat.", device="cpu")
    empty = encoder.encode_empty(1)
    close(empty.prompt_embeds, negative_embeds)
    close(empty.pooled, negative_pooled, 2e-5)


def test_one_segment_is_that_of_the_pipeline_up_to_its_end(models, pipeline):
    encoder = DualEncoder(*models, token_budget=77, policy=SpecialTokenPolicy(end="keep"))
    result = encoder(SHORT)
    embeds, _, pooled, _ = pipeline.encode_prompt(SHORT, device="cpu")
    assert result.attention_mask.sum(dim=1).tolist() == [10, 2, 5]
    close(result.prompt_embeds[result.attention_mask], embeds[result.attention_mask])
    close(result.pooled, pooled, 2e-5)


def test_each_tower_pads_with_its_own_vector(models, pipeline):
    result = DualEncoder(*models)(["A cat."])
    embeds, *_ = pipeline.encode_prompt([""], device="cpu")
    close(result.prompt_embeds[0, 4:], embeds[0, -60:].mean(dim=0).expand(236, -1))


def test_is_both_towers_side_by_side(models):
    text_model, tokenizer, text_model_2, tokenizer_2 = models
    settings = {
        "policy": SpecialTokenPolicy(start="first", pad="eos"),
        "token_budget": 50,
        "layer": -2,
        "long_segments": "truncate",
        "over_budget": "proportional",
    }
    both = DualEncoder(*models, **settings)(CAPTIONS)
    first = SegmentEncoder(text_model, tokenizer, **settings)(CAPTIONS)
    second = SegmentEncoder(text_model_2, tokenizer_2, **settings)(CAPTIONS)
    assert torch.equal(both.prompt_embeds[..., :32], first.prompt_embeds)
    assert torch.equal(both.prompt_embeds[..., 32:], second.prompt_embeds)
    assert torch.equal(both.pooled, second.pooled)
    assert torch.equal(both.attention_mask, first.attention_mask)
    assert both.report == first.report


def test_words_like_the_second_padding_stay_in_both_towers(models):
    encoder = DualEncoder(*models, policy=SpecialTokenPolicy(drop_pad_words=True))
    result = encoder(["Stop !"])
    assert result.report.kept_tokens == (3,)
    sequence = encoder.tower.wrap(encoder.tower.word_ids("Stop !"))
    states = encoder.tower_2([sequence])[sequence]
    assert torch.equal(result.prompt_embeds[0, :3, 32:], states[:3])


def test_pooled_features_are_a_choice(models):
    mean, first = DualEncoder(*models), DualEncoder(*models, pooled="first")
    parts = mean(["A cat.", "A dog."]).pooled
    close(mean(["A cat. A dog."]).pooled[0], parts.mean(dim=0))
    close(first(["A cat. A dog."]).pooled[0], parts[0])
    assert torch.equal(mean.segment_features(["A cat.", "A dog."]), parts)


def test_the_negative_prompt_is_zero_and_still_has_a_token(models):
    zeros = DualEncoder(*models).encode_empty(3)
    encoded = DualEncoder(*models, force_zeros_for_empty_prompt=False)
    assert zeros.prompt_embeds.shape == (3, 240, 72)
    assert not zeros.prompt_embeds.any()
    assert not zeros.pooled.any()
    assert zeros.attention_mask.sum(dim=1).tolist() == [1, 1, 1]
    assert torch.equal(encoded.encode_empty(3).prompt_embeds, encoded([""] * 3).prompt_embeds)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("cache_bytes", [0, 2**22])
def test_a_caption_does_not_depend_on_its_batch(models, dtype, atol, cache_bytes):
    encoder = DualEncoder(*models, token_budget=96, cache_bytes=cache_bytes).to(dtype)
    together, shuffled = encoder(CAPTIONS), encoder(CAPTIONS[::-1])
    assert (encoder.tower_2.cached_bytes > 0) == (cache_bytes > 0)
    plain = DualEncoder(*models, token_budget=96, cache_bytes=0).to(dtype)
    for i, caption in enumerate(CAPTIONS):
        alone = plain([caption])
        for batch, row in ((together, i), (shuffled, -1 - i)):
            for name in ("prompt_embeds", "pooled", "attention_mask"):
                close(getattr(batch, name)[row], getattr(alone, name)[0], atol)


def test_the_bound_on_the_cache_is_that_of_both_towers(models):
    encoder = DualEncoder(*models, cache_bytes=72_000)
    encoder([f"Picture number {i} of a cat." for i in range(60)])
    assert 60_000 < encoder.tower.cached_bytes + encoder.tower_2.cached_bytes <= 72_000
    encoder.clear_cache()
    assert encoder.tower.cached_bytes == encoder.tower_2.cached_bytes == 0


def test_gradients_reach_both_towers(models):
    encoder = DualEncoder(*models)
    encoder.requires_grad_(True)
    result = encoder(["A cat. A dog."])
    (result.prompt_embeds.square().sum() + result.pooled.square().sum()).backward()
    for tower in (encoder.tower, encoder.tower_2):
        assert tower.text_model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [DualEncoder, TruncatedDualEncoder])
def test_refuses_towers_that_do_not_belong_together(models, kind):
    models[2].config.max_position_embeddings = 64
    with pytest.raises(ConfigError, match="one context; got 77 and 64 tokens"):
        kind(*models)


def test_refuses_two_vocabularies(models, tokenizer_2):
    other = clip_tokenizer("!")
    other.get_vocab = lambda: {"a": 0}
    with pytest.raises(ConfigError, match="one vocabulary; got two"):
        DualEncoder(*models[:3], other)
