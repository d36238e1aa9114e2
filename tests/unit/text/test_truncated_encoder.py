import pytest
import torch

from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.tokenizer import char_token_positions
from segalign.text.truncated_encoder import TruncatedEncoder

LONG = "A red cat sleeps in the top left. " * 12
CAPTIONS = ["", "A red cat.", LONG, "A red cat."]


@pytest.fixture
def encoder(text_model, tokenizer):
    return TruncatedEncoder(text_model, tokenizer)


def test_equals_ordinary_padded_and_truncated_encoding(encoder, text_model, tokenizer):
    batch = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    own = text_model(input_ids=batch.input_ids)
    result = encoder(CAPTIONS)
    assert result.prompt_embeds.shape == (4, 77, 32)
    torch.testing.assert_close(result.prompt_embeds, own.last_hidden_state, rtol=0, atol=5e-6)
    torch.testing.assert_close(result.pooled, own.pooler_output, rtol=0, atol=5e-6)
    assert torch.equal(result.attention_mask, batch.attention_mask.bool())


def test_reports_what_is_lost(encoder):
    report = encoder(CAPTIONS).report
    num_words = encoder.tower.count_word_tokens(LONG)
    assert report.num_segments == (1, 1, 1, 1)
    assert report.cut_segments == (0, 0, 1, 0)
    assert report.dropped_tokens == (0, 0, num_words - 75, 0)
    assert report.kept_tokens == (2, 6, 77, 6)


def test_ignores_text_from_position_76_on(encoder, tokenizer):
    positions = char_token_positions(LONG, tokenizer)
    kept = LONG[: (positions <= 75).sum()]
    before = encoder([LONG]).prompt_embeds
    assert torch.equal(before, encoder([kept + " zebra"]).prompt_embeds)
    shorter = LONG[: (positions <= 74).sum()]
    assert not torch.equal(before, encoder([shorter + " zebra"]).prompt_embeds)


def test_negative_conditioning_is_the_empty_caption(encoder):
    negative, empty = encoder.encode_empty(2), encoder(["", ""])
    assert torch.equal(negative.prompt_embeds, empty.prompt_embeds)
    assert negative.report == empty.report


def test_has_the_interface_of_the_segment_encoder(encoder, text_model, tokenizer):
    segments = SegmentEncoder(text_model, tokenizer, token_budget=9)
    for conditioner in (encoder, segments):
        result = conditioner(["A cat.", "A dog."])
        assert result.prompt_embeds.shape == (2, conditioner.token_budget, conditioner.width)
        conditioner.clear_cache()
        assert conditioner.tower.cached_bytes == 0


def test_gradients_reach_a_trainable_model(encoder, text_model):
    text_model.requires_grad_(True)
    encoder(["A cat."]).prompt_embeds.square().sum().backward()
    assert text_model.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("cache_bytes", [0, 2**22])
def test_a_caption_does_not_depend_on_its_batch(text_model, tokenizer, dtype, atol, cache_bytes):
    def make(cache_bytes):
        return TruncatedEncoder(text_model, tokenizer, cache_bytes=cache_bytes).to(dtype)

    encoder = make(cache_bytes)
    together, shuffled = encoder(CAPTIONS), encoder(CAPTIONS[::-1])
    for i, caption in enumerate(CAPTIONS):
        alone = make(0)([caption])
        for batch, row in ((together, i), (shuffled, -1 - i)):
            for name in ("prompt_embeds", "pooled", "attention_mask"):
                ours, own = getattr(batch, name)[row], getattr(alone, name)[0]
                torch.testing.assert_close(ours, own, rtol=0, atol=atol)


def test_a_projecting_model_is_read_from_any_layer(projecting_model, tokenizer):
    encoder = TruncatedEncoder(projecting_model, tokenizer, layer=-2)
    batch = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    own = projecting_model(input_ids=batch.input_ids, output_hidden_states=True)
    result = encoder(CAPTIONS)
    torch.testing.assert_close(result.prompt_embeds, own.hidden_states[-2], rtol=0, atol=5e-6)
    torch.testing.assert_close(result.pooled, own.text_embeds, rtol=0, atol=2e-5)


def test_refuses_an_empty_batch(encoder):
    with pytest.raises(ValueError, match="at least one caption"):
        encoder([])
