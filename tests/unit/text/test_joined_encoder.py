import pytest
import torch
from toy_t5 import toy_adapter, toy_t5, toy_t5_tokenizer

from segalign.errors import ConfigError
from segalign.text.joined_encoder import JoinedEncoder
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.t5_encoder import T5Encoder

CAPTIONS = ["A red cat. A blue dog sits on the mat.", "", "one two three four five six seven " * 4]


@pytest.fixture
def clip(text_model, tokenizer):
    return SegmentEncoder(text_model, tokenizer, token_budget=20)


@pytest.fixture
def t5():
    return T5Encoder(
        toy_t5(), toy_t5_tokenizer(["cat"]), adapter=toy_adapter(out_dim=32), token_budget=30
    )


@pytest.fixture
def joined(clip, t5):
    return JoinedEncoder([clip, t5])


def test_tokens_stand_one_behind_the_other(joined, clip, t5):
    result, first, second = joined(CAPTIONS), clip(CAPTIONS), t5(CAPTIONS)
    assert result.prompt_embeds.shape == (3, 50, 32)
    assert torch.equal(result.prompt_embeds[:, :20], first.prompt_embeds)
    assert torch.equal(result.prompt_embeds[:, 20:], second.prompt_embeds)
    assert torch.equal(result.attention_mask[:, :20], first.attention_mask)
    assert torch.equal(result.attention_mask[:, 20:], second.attention_mask)
    assert (joined.token_budget, joined.width) == (50, 32)


def test_order_is_that_of_the_parts(joined, clip, t5):
    swapped = JoinedEncoder([t5, clip])(CAPTIONS)
    assert torch.equal(swapped.prompt_embeds[:, 30:], joined(CAPTIONS).prompt_embeds[:, :20])


def test_pooled_is_that_of_the_first_part_that_has_one(joined, clip, t5):
    expected = clip(CAPTIONS).pooled
    assert torch.equal(joined(CAPTIONS).pooled, expected)
    assert torch.equal(JoinedEncoder([t5, clip])(CAPTIONS).pooled, expected)
    assert JoinedEncoder([t5])(CAPTIONS).pooled is None


def test_masked_columns_inside_are_not_cut_off(joined):
    result = joined(CAPTIONS[:2])
    assert result.num_leading is None
    assert result.without_masked_tail() is result


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_report_counts_segments_once_and_all_tokens(clip, t5, order):
    parts = [[clip, t5][i] for i in order]
    result, first, second = JoinedEncoder(parts)(CAPTIONS), clip(CAPTIONS), t5(CAPTIONS)
    assert result.report.num_segments == first.report.num_segments
    assert result.report.num_segments[0] == 2
    assert result.report.cut_segments == first.report.cut_segments
    assert result.report.kept_tokens == tuple(result.attention_mask.sum(dim=1).tolist())
    assert result.report.dropped_tokens == tuple(
        ours + theirs
        for ours, theirs in zip(
            first.report.dropped_tokens, second.report.dropped_tokens, strict=True
        )
    )
    assert min(first.report.dropped_tokens[2], second.report.dropped_tokens[2]) > 0


def test_without_segments_the_first_part_counts(t5):
    assert JoinedEncoder([t5, t5])(CAPTIONS).report.num_segments == (1, 1, 1)


def test_empty_caption_is_the_parts_own(joined):
    empty = joined.encode_empty(4)
    assert empty.prompt_embeds.shape == (4, 50, 32)
    assert torch.equal(empty.prompt_embeds[3], joined(CAPTIONS).prompt_embeds[1])
    assert len(empty.report.kept_tokens) == 4
    assert empty.prompt_embeds.stride(0) == 0


def test_a_caption_does_not_depend_on_its_batch(joined):
    together = joined(CAPTIONS).prompt_embeds
    joined.clear_cache()
    for caption, expected in zip(CAPTIONS, together, strict=True):
        assert torch.equal(joined([caption]).prompt_embeds[0], expected)


def test_clearing_reaches_every_part(joined, clip, t5):
    joined(CAPTIONS)
    assert clip.tower.cached_bytes > 0
    assert t5.cached_bytes > 0
    joined.clear_cache()
    assert clip.tower.cached_bytes == t5.cached_bytes == 0


def test_segments_are_those_of_the_part_that_splits(clip, t5):
    joined = JoinedEncoder([t5, clip])
    assert joined.tower is clip.tower
    assert joined.split(CAPTIONS[0]) == clip.split(CAPTIONS[0])
    with pytest.raises(AttributeError, match="split"):
        _ = JoinedEncoder([t5]).split
    assert not hasattr(JoinedEncoder([t5]), "tower")


def test_gradient_reaches_the_adapter_through_the_join(joined, t5):
    joined(CAPTIONS).prompt_embeds.square().sum().backward()
    trained = {name for name, weight in joined.named_parameters() if weight.grad is not None}
    assert trained == {f"parts.1.adapter.{name}" for name, _ in t5.adapter.named_parameters()}


def test_training_mode_leaves_the_frozen_t5_evaluating(joined, t5):
    joined.train()
    assert t5.adapter.training
    assert not t5.model.training


def test_the_wider_dtype_is_the_results(clip, t5):
    joined = JoinedEncoder([clip.to(torch.bfloat16), t5])
    assert joined(CAPTIONS).prompt_embeds.dtype == torch.float32


def test_widths_must_agree(clip):
    bare = T5Encoder(toy_t5(width=48), toy_t5_tokenizer(), token_budget=8)
    with pytest.raises(ConfigError, match=r"`SegmentEncoder` gives 32 and `T5Encoder` 48"):
        JoinedEncoder([clip, bare])
    with pytest.raises(ConfigError, match="at least one text encoder"):
        JoinedEncoder([])
