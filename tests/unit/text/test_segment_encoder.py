import pytest
import torch
from torch import nn

from segalign.errors import ConfigError
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.special_tokens import SpecialTokenPolicy

CAPTIONS = [
    "",
    "A red cat sleeps.",
    "A red cat sleeps. A blue dog, e.g. a poodle, runs 3.5 metres. The sky is grey.",
    "The sky is grey. " * 40,
    "red apples, green pears, " * 30,
    "“Curly” quotes… 🐈 猫が寝る。",
    " \n ",
]


@pytest.fixture
def make_encoder(make_text_model, tokenizer):
    def make(model=None, **settings):
        return SegmentEncoder(
            model or make_text_model(), tokenizer, **{"token_budget": 96, **settings}
        )

    return make


def hidden(encoder, text, *, padded=False):
    """Encode one segment with the text model itself."""
    ids = encoder.tower.wrap(encoder.tower.word_ids(text), padded=padded)
    return encoder.tower.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def close(a, b, atol=5e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_one_segment_is_start_and_words_then_pad_star(make_encoder):
    encoder = make_encoder()
    result = encoder(["A red cat sleeps."])
    states = hidden(encoder, "A red cat sleeps.")
    pad_star = hidden(encoder, "", padded=True)[-60:].mean(dim=0)
    assert result.prompt_embeds.shape == (1, 96, 32)
    close(result.prompt_embeds[0, :6], states[:-1])
    close(result.prompt_embeds[0, 6:], pad_star.expand(90, 32))
    assert result.attention_mask.tolist() == [[True] * 6 + [False] * 90]
    close(result.pooled[0], states[-1])


def test_the_empty_caption_is_one_start_token(make_encoder):
    result = make_encoder()(["", " \n ", "\x00"])
    assert result.attention_mask.sum(dim=1).tolist() == [1, 1, 1]
    assert torch.equal(result.prompt_embeds[0], result.prompt_embeds[1])
    assert torch.equal(result.prompt_embeds[0], result.prompt_embeds[2])


def test_segments_without_a_word_are_left_out(make_encoder):
    encoder = make_encoder()
    blanks = encoder.encode_segments([["A cat.", " ", "\x00"]])
    assert torch.equal(blanks.prompt_embeds, encoder(["A cat."]).prompt_embeds)
    assert torch.equal(blanks.pooled, encoder(["A cat."]).pooled)
    assert blanks.report.num_segments == (1,)


def test_segments_are_concatenated_in_order(make_encoder):
    encoder = make_encoder()
    result = encoder(["A cat. A dog. A cat."])
    cat, dog = hidden(encoder, "A cat.")[:-1], hidden(encoder, "A dog.")[:-1]
    close(result.prompt_embeds[0, :12], torch.cat([cat, dog, cat]))
    close(result.pooled[0], (2 * hidden(encoder, "A cat.")[-1] + hidden(encoder, "A dog.")[-1]) / 3)


def test_naive_concatenation_is_a_policy(make_encoder):
    encoder = make_encoder(policy=SpecialTokenPolicy(end="keep", pad="eos"))
    result = encoder(["A cat. A dog."])
    close(
        result.prompt_embeds[0, :10],
        torch.cat([hidden(encoder, "A cat."), hidden(encoder, "A dog.")]),
    )
    close(result.prompt_embeds[0, 10], hidden(encoder, "")[1])
    assert result.report.kept_tokens == (10,)


def test_only_the_first_start_is_a_policy(make_encoder):
    encoder = make_encoder(policy=SpecialTokenPolicy(start="first"))
    result = encoder(["A cat. A dog.", "A dog. A cat."])
    cat, dog = hidden(encoder, "A cat.")[:-1], hidden(encoder, "A dog.")[:-1]
    close(result.prompt_embeds[0, :7], torch.cat([cat, dog[1:]]))
    close(result.prompt_embeds[1, :7], torch.cat([dog, cat[1:]]))


@pytest.mark.parametrize(
    ("dtype", "atol", "cache_bytes"),
    [
        (torch.float32, 5e-6, 0),
        (torch.float32, 5e-6, 2**20),
        (torch.float64, 1e-12, 0),
        (torch.float64, 1e-12, 2**20),
    ],
)
def test_a_caption_does_not_depend_on_its_batch(make_encoder, dtype, atol, cache_bytes):
    encoder = make_encoder(cache_bytes=cache_bytes).to(dtype)
    together = encoder(CAPTIONS)
    shuffled = encoder(CAPTIONS[::-1])
    assert together.prompt_embeds.dtype == dtype
    for i, caption in enumerate(CAPTIONS):
        alone = make_encoder(cache_bytes=0).to(dtype)([caption])
        for batch, row in ((together, i), (shuffled, -1 - i)):
            close(batch.prompt_embeds[row], alone.prompt_embeds[0], atol)
            close(batch.pooled[row], alone.pooled[0], atol)
            assert torch.equal(batch.attention_mask[row], alone.attention_mask[0])


def test_encoding_is_that_of_the_padded_reference(make_encoder):
    """All segments of the batch padded to the longest, merged token by token."""
    encoder = make_encoder().double()
    result = encoder(CAPTIONS)
    tower = encoder.tower
    for row, caption in enumerate(CAPTIONS):
        ids = [i for s in encoder.split(caption) if (i := tower.word_ids(s.text))] or [()]
        padded = torch.tensor([tower.wrap(i, padded=True) for i in ids])
        states = tower.text_model(input_ids=padded).last_hidden_state
        tokens = [state for i, s in zip(ids, states, strict=True) for state in s[: len(i) + 1]]
        expected = torch.stack(tokens)[:96]
        close(result.prompt_embeds[row, : len(expected)], expected, atol=1e-12)


def test_over_long_segments_are_cut_and_reported(make_encoder):
    encoder = make_encoder(token_budget=240)
    caption = "red apples, green pears, " * 20 + "and one blue plum"
    report = encoder([caption, "A cat."]).report
    num_words = encoder.tower.count_word_tokens(caption)
    assert report.cut_segments == (1, 0)
    assert report.num_segments == (2, 1)
    assert report.dropped_tokens == (0, 0)
    assert report.kept_tokens == (num_words + 2, 4)


def test_truncated_segments_are_reported(make_encoder):
    encoder = make_encoder(token_budget=240, long_segments="truncate")
    caption = "red apples, green pears, " * 20
    report = encoder([caption]).report
    num_words = encoder.tower.count_word_tokens(caption)
    assert (report.cut_segments, report.num_segments) == ((1,), (1,))
    assert report.kept_tokens == (76,)
    assert report.dropped_tokens == (num_words - 75,)


def test_tokens_over_the_budget_are_reported(make_encoder):
    report = make_encoder(token_budget=10)(["A cat. A dog. A fox.", "A cat."]).report
    assert report.kept_tokens == (10, 4)
    assert report.dropped_tokens == (2, 0)
    assert report.totals() == {
        "num_segments": 4,
        "cut_segments": 0,
        "dropped_tokens": 2,
        "kept_tokens": 14,
    }


def test_segments_behind_the_budget_are_not_encoded(make_encoder):
    encoder = make_encoder(token_budget=8)
    encoder(["A cat. A dog. A fox."])
    fox = encoder.tower.wrap(encoder.tower.word_ids("A fox."))
    keys = {ids for ids, _ in encoder.tower._features._cache._entries}
    assert encoder.tower.wrap(encoder.tower.word_ids("A dog.")) in keys
    assert fox not in keys


def test_split_gives_the_encoded_segments_with_their_spans(make_encoder):
    encoder = make_encoder()
    caption = "A cat. " + "red apples, green pears, " * 30
    segments = encoder.split(caption)
    assert "".join(s.text for s in segments) == caption
    assert all(encoder.tower.count_word_tokens(s.text) <= 75 for s in segments)
    assert len(segments) == encoder([caption]).report.num_segments[0]


def test_gradients_reach_a_trainable_model_through_tokens_padding_and_pooled(make_encoder):
    encoder = make_encoder()
    encoder.tower.text_model.requires_grad_(True)
    for part in (
        lambda r: r.prompt_embeds[r.attention_mask],
        lambda r: r.prompt_embeds[~r.attention_mask],
        lambda r: r.pooled,
    ):
        encoder.zero_grad()
        part(encoder(["A cat. A dog."])).square().sum().backward()
        grads = [weight.grad for weight in encoder.tower.text_model.encoder.parameters()]
        # The bias of the keys cancels in the softmax.
        assert sum(grad is not None and bool(grad.abs().max() > 1e-5) for grad in grads) >= 28


def test_gradient_is_the_reference_gradient(make_encoder):
    encoder = make_encoder().double()
    weight = encoder.tower.text_model.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    result = encoder(["A cat. A dog. A cat."])
    mixer = torch.randn_like(result.prompt_embeds)
    (ours,) = torch.autograd.grad((result.prompt_embeds * mixer).sum(), weight)
    cat, dog = hidden(encoder, "A cat.")[:-1], hidden(encoder, "A dog.")[:-1]
    pad_star = hidden(encoder, "", padded=True)[-60:].mean(dim=0)
    reference = torch.cat([cat, dog, cat, pad_star.expand(84, 32)])
    (expected,) = torch.autograd.grad((reference * mixer[0]).sum(), weight)
    close(ours, expected, atol=1e-10)


def test_negative_conditioning_is_the_empty_caption(make_encoder):
    encoder = make_encoder()
    negative, empty = encoder.encode_empty(3), encoder([""] * 3)
    assert torch.equal(negative.prompt_embeds, empty.prompt_embeds)
    assert torch.equal(negative.attention_mask, empty.attention_mask)
    assert torch.equal(negative.pooled, empty.pooled)
    assert negative.report == empty.report


def test_segment_features_keep_order_and_duplicates(make_encoder):
    encoder = make_encoder()
    features = encoder.segment_features(["A cat.", "A dog.", "A cat."])
    assert torch.equal(features[0], features[2])
    close(features[1], hidden(encoder, "A dog.")[-1])


def test_pooled_features_are_projected(make_encoder):
    projection = nn.Linear(32, 5, bias=False)
    encoder, plain = make_encoder(text_projection=projection), make_encoder()
    close(encoder(CAPTIONS).pooled, projection(plain(CAPTIONS).pooled))
    close(encoder.segment_features(["A"]), projection(plain.segment_features(["A"])))


def test_pooled_features_of_the_first_segment_are_a_choice(make_encoder):
    encoder = make_encoder(pooled="first")
    result = encoder(["A cat. A dog. A bird.", "", "A dog. A cat."])
    close(result.pooled, make_encoder()(["A cat.", "", "A dog."]).pooled)


def test_a_projecting_model_is_read_from_any_layer(make_encoder, projecting_model):
    encoder = make_encoder(projecting_model, layer=-2)
    result = encoder(["A cat. A dog."])
    ids = [encoder.tower.wrap(encoder.tower.word_ids(text)) for text in ("A cat.", "A dog.")]
    own = projecting_model(input_ids=torch.tensor(ids), output_hidden_states=True)
    close(result.prompt_embeds[0, :8], own.hidden_states[-2][:, :-1].flatten(0, 1))
    close(result.pooled[0], own.text_embeds.mean(dim=0), 2e-5)
    close(encoder.segment_features(["A dog."]), own.text_embeds[1:], 2e-5)


def test_refuses_to_project_twice(make_encoder, projecting_model):
    with pytest.raises(ConfigError, match="`text_projection` must be left out"):
        make_encoder(projecting_model, text_projection=nn.Linear(24, 5))


@pytest.mark.parametrize(
    "caption",
    [
        "\ud800 lone",
        "nul \x00 here",
        "?!",
        "<|endoftext|> a <|startoftext|>",
        "猫" * 500,
        "x" * 10_000,
    ],
)
def test_odd_captions_are_encoded(make_encoder, caption):
    result = make_encoder()([caption])
    assert torch.isfinite(result.prompt_embeds).all()
    assert result.report.kept_tokens[0] == result.attention_mask.sum() > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_budget": 0}, "`token_budget` must be at least 1; got 0"),
        ({"long_segments": "drop"}, "one of `cut_further`, `truncate`; got 'drop'"),
        ({"policy": SpecialTokenPolicy(num_pad_positions=78)}, r"context .* \(77\); got 78"),
        ({"pooled": "last"}, "`pooled` must be one of `mean`, `first`; got 'last'"),
        ({"layer": 0}, "`layer` must be -1 .* got 0"),
    ],
)
def test_refuses_settings_that_cannot_work(make_encoder, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_encoder(**settings)


def test_refuses_an_empty_batch(make_encoder):
    with pytest.raises(ValueError, match="at least one caption"):
        make_encoder()([])
