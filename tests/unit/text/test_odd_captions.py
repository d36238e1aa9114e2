# ruff: noqa: RUF001 - these tests are about such characters
"""Captions that no one should write, through the whole encoder."""

import random

import pytest
import torch

from segalign.errors import ConfigError
from segalign.text import clip_tower
from segalign.text.clauses import ClauseSegmenter
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.segmenter import OfficialSegmenter, SentenceSegmenter
from segalign.text.windows import WindowSegmenter

SEGMENTERS = {
    "sentence": SentenceSegmenter(),
    "official": OfficialSegmenter(),
    "clause": ClauseSegmenter(),
    "window": WindowSegmenter(num_tokens=20),
}
EMPTY = ["", " ", "\n\t \r\n", "\x00", "\x00" * 500, "\u3000\xa0"]
ODD = [
    "...",
    "?!",
    ",;: — -",
    "“”",
    "A cat\x00 sits.\x00 A dog.",
    "\ud800",
    "a \udfff cat. \ud83d A dog, \udc00\ud800 and a fox",
    "<|endoftext|> a <|startoftext|>. A cat.",
    "猫" * 200,
    "猫，狗。" * 60,
    "x" * 3_000,
    "." * 3_000,
    "a. " * 300,
    "👩‍👩‍👧" * 40,
    "e\u0301\u0302" * 100,
    "&amp;lt; " * 60,
    "Ã©â€™. " * 30,
]


@pytest.fixture(params=SEGMENTERS)
def make_encoder(request, text_model, tokenizer):
    def make(**settings):
        return SegmentEncoder(
            text_model, tokenizer, segmenter=SEGMENTERS[request.param], **settings
        )

    return make


def test_captions_without_a_word_are_the_empty_caption(make_encoder):
    encoder = make_encoder(token_budget=20)
    empty = encoder.encode_empty(1)
    # The official strategy makes a stop of blanks.
    result = encoder([text for text in EMPTY if "." not in encoder.split(text)[0].text])
    assert len(result.prompt_embeds) >= 1
    for row in result.prompt_embeds:
        assert torch.equal(row, empty.prompt_embeds[0])
    assert set(result.report.kept_tokens) == {1}
    assert set(result.report.dropped_tokens) == {0}


@pytest.mark.parametrize("over_budget", ["cut", "proportional"])
def test_odd_captions_are_encoded_and_counted(make_encoder, over_budget):
    encoder = make_encoder(token_budget=40, over_budget=over_budget)
    result = encoder(ODD)
    assert torch.isfinite(result.prompt_embeds).all()
    assert torch.isfinite(result.pooled).all()
    kept, dropped = result.report.kept_tokens, result.report.dropped_tokens
    assert result.attention_mask.sum(dim=1).tolist() == list(kept)
    totals = make_encoder(token_budget=5_000)(ODD).report
    assert set(totals.dropped_tokens) == {0}
    assert [k + d for k, d in zip(kept, dropped, strict=True)] == list(totals.kept_tokens)
    assert list(kept) == [min(total, 40) for total in totals.kept_tokens]
    assert min(totals.kept_tokens) > 1


@pytest.mark.parametrize("over_budget", ["cut", "proportional"])
@pytest.mark.parametrize("token_budget", [1, 2, 5])
def test_a_budget_smaller_than_one_segment(make_encoder, over_budget, token_budget):
    encoder = make_encoder(token_budget=token_budget, over_budget=over_budget)
    caption = "An old red cat sleeps on the mat. A dog runs through the park at night."
    result = encoder([caption])
    report = result.report
    assert result.prompt_embeds.shape == (1, token_budget, 32)
    assert result.attention_mask.all()
    assert report.kept_tokens == (token_budget,)
    whole = make_encoder(token_budget=100)([caption]).report
    assert report.dropped_tokens == (whole.kept_tokens[0] - token_budget,)
    assert report.num_segments == whole.num_segments


def test_proportional_keeps_something_of_every_segment(text_model, tokenizer):
    captions = ["A cat sleeps. " * 5 + "A dog runs through the park at night."]
    cut = SegmentEncoder(text_model, tokenizer, token_budget=18)(captions)
    encoder = SegmentEncoder(
        text_model, tokenizer, token_budget=18, over_budget="proportional", cache_bytes=0
    )
    shared = encoder(captions)
    # Of 35 tokens a cat has 5, so a share of 2.6, and the dog 10, so a share of 5.1.
    dog = encoder.tower.wrap(encoder.tower.word_ids("A dog runs through the park at night."))
    features = encoder.tower([dog])[dog]
    assert not any(torch.allclose(row, features[2], atol=1e-4) for row in cut.prompt_embeds[0])
    assert any(torch.allclose(row, features[2], atol=1e-4) for row in shared.prompt_embeds[0])
    assert shared.report == cut.report
    assert not torch.allclose(shared.pooled, cut.pooled)


def test_refuses_an_unknown_over_budget(text_model, tokenizer):
    with pytest.raises(ConfigError, match="`over_budget` must be one of `cut`, `proportional`; go"):
        SegmentEncoder(text_model, tokenizer, over_budget="drop")


def huge_caption(num_chars, stop):
    draw = random.Random(0)
    words = ["cat", "dog", "extraordinary", "runs", "in", "the", "blue", "1990", "it's", "low-key"]
    parts, size = [], 0
    while size < num_chars:
        parts.append(" ".join(draw.choices(words, k=draw.randint(4, 20))).capitalize() + stop)
        size += len(parts[-1])
    return "".join(parts)[:num_chars]


@pytest.mark.parametrize(
    ("num_chars", "stop", "over_budget"),
    [(1_000_000, ". ", "cut"), (250_000, " ", "proportional")],
    ids=["sentences", "no stops"],
)
def test_a_huge_caption(text_model, tokenizer, monkeypatch, num_chars, stop, over_budget):
    """Nothing behind the budget is encoded, each character is tokenized about twice at most."""
    caption = huge_caption(num_chars, stop)
    num_tokenized = 0
    tokenize = clip_tower.word_token_ids

    def count(text, tokenizer, cleaning):
        nonlocal num_tokenized
        num_tokenized += len(text)
        return tokenize(text, tokenizer, cleaning)

    monkeypatch.setattr(clip_tower, "word_token_ids", count)
    encoder = SegmentEncoder(text_model, tokenizer, over_budget=over_budget)
    report = encoder([caption]).report
    assert num_tokenized < 2.2 * len(caption)
    assert encoder.tower.cached_bytes < 1_000 * 32 * 4
    pieces = encoder.split(caption)
    assert report.num_segments == (len(pieces),)
    num_tokens = sum(encoder.tower.count_word_tokens(piece.text) + 1 for piece in pieces)
    assert report.kept_tokens == (240,)
    assert report.dropped_tokens == (num_tokens - 240,)
