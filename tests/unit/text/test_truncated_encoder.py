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
