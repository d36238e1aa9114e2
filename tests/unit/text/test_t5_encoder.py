import copy
import weakref

import pytest
import torch
from accelerate import cpu_offload
from toy_t5 import toy_adapter, toy_t5, toy_t5_tokenizer
from transformers import ByT5Tokenizer

from segalign.errors import ConfigError
from segalign.text.adapter import TextAdapter
from segalign.text.t5_encoder import T5Encoder, encodable_text

L = 24
CAPTIONS = ["a red cat.", "", "a blue dog sits on the mat, by the old tree!", "a red cat.", "1 2 3"]


@pytest.fixture
def make_encoder():
    def make(model=None, tokenizer=None, **settings):
        tokenizer = tokenizer or toy_t5_tokenizer(["cat", "dog", "tree"])
        return T5Encoder(model or toy_t5(), tokenizer, **{"token_budget": L, **settings})

    return make


def count_passes(encoder):
    """Record the number of captions of each pass."""
    sizes = []
    encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


def gradients(adapter):
    return {name: weight.grad.clone() for name, weight in adapter.named_parameters()}


@pytest.mark.parametrize("attend_to_padding", [True, False])
@pytest.mark.parametrize("tokenizer", [toy_t5_tokenizer(["cat"]), ByT5Tokenizer(extra_ids=0)])
def test_equals_the_models_own_call(make_encoder, tokenizer, attend_to_padding):
    encoder = make_encoder(tokenizer=tokenizer, attend_to_padding=attend_to_padding)
    result = encoder(CAPTIONS)
    batch = tokenizer(
        CAPTIONS, max_length=L, padding="max_length", truncation=True, return_tensors="pt"
    )
    mask = None if attend_to_padding else batch["attention_mask"]
    own = encoder.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(result.prompt_embeds, own, rtol=0, atol=5e-6)
    assert torch.equal(result.attention_mask, batch["attention_mask"].bool())


def test_padding_is_seen_unless_masked(make_encoder):
    seeing, masking = make_encoder(), make_encoder(attend_to_padding=False)
    longer = make_encoder(token_budget=2 * L)
    ours = seeing(CAPTIONS)
    words = ours.attention_mask
    assert not torch.allclose(ours.prompt_embeds[words], masking(CAPTIONS).prompt_embeds[words])
    assert not torch.allclose(
        ours.prompt_embeds[0, :5], longer(CAPTIONS).prompt_embeds[0, :5], atol=1e-3
    )


def test_result_has_the_documented_parts(make_encoder):
    result = make_encoder(adapter=toy_adapter())(CAPTIONS)
    assert result.prompt_embeds.shape == (5, L, 16)
    assert result.attention_mask.shape == (5, L)
    assert result.attention_mask.dtype == torch.bool
    assert result.pooled is None
    assert result.num_leading == L
    assert make_encoder()(["", "a"]).num_leading == 3
    assert make_encoder().width == 32
    assert make_encoder(adapter=toy_adapter()).width == 16


def test_counts_are_exact(make_encoder):
    encoder = make_encoder(tokenizer=ByT5Tokenizer(extra_ids=0), token_budget=6)
    report = encoder(["", "abc", "abcde", "abcdef", "x" * 5000]).report
    # Every byte is a token and `</s>` one more.
    assert report.kept_tokens == (1, 4, 6, 6, 6)
    assert report.dropped_tokens == (0, 0, 0, 1, 4995)
    assert report.cut_segments == (0, 0, 0, 1, 1)
    assert report.num_segments == (1,) * 5


def test_a_cut_caption_keeps_its_end_token(make_encoder):
    encoder = make_encoder(token_budget=4)
    seen = []
    encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    result = encoder(["cat dog cat dog tree"])
    ids = encoder.token_ids("cat dog cat dog tree")
    assert len(ids) == 6
    assert seen[0].tolist() == [[*ids[:3], 1]]
    assert result.attention_mask.all()


def test_budget_of_one_keeps_the_end_token(make_encoder):
    result = make_encoder(token_budget=1)(["a cat", ""])
    assert result.report.kept_tokens == (1, 1)
    assert torch.equal(result.prompt_embeds[0], result.prompt_embeds[1])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("attend_to_padding", [True, False])
def test_result_is_the_same_to_the_last_bit_in_every_batch(
    make_encoder, attend_to_padding, num_threads
):
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        settings = {"adapter": toy_adapter(), "attend_to_padding": attend_to_padding}
        captions = [f"{'a red cat ' * (i % 9)} number {i}" for i in range(40)]
        together = make_encoder(**settings, cache_bytes=0)(captions).prompt_embeds
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
        cached = make_encoder(**settings)
        for _ in range(2):
            shuffled = cached([captions[i] for i in order]).prompt_embeds
            assert torch.equal(shuffled, together[order])
        for i in (0, 7, 39):
            alone = make_encoder(**settings, cache_bytes=0)([captions[i]]).prompt_embeds
            assert torch.equal(alone[0], together[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
def test_result_does_not_depend_on_the_size_of_a_pass(make_encoder, dtype, atol):
    many, single = make_encoder().to(dtype), make_encoder(captions_per_pass=1).to(dtype)
    ours, theirs = many(CAPTIONS).prompt_embeds, single(CAPTIONS).prompt_embeds
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_equal_captions_are_encoded_once_in_bounded_passes(make_encoder):
    encoder = make_encoder(cache_bytes=0, captions_per_pass=3)
    sizes = count_passes(encoder)
    encoder([chr(ord("a") + i % 8) for i in range(80)])
    assert sizes == [3, 3, 2]


def test_cache_spares_the_model(make_encoder):
    encoder = make_encoder()
    sizes = count_passes(encoder)
    first = encoder(CAPTIONS).prompt_embeds
    again = encoder([*CAPTIONS, "new"]).prompt_embeds
    assert sizes == [4, 1]
    assert torch.equal(first, again[:5])
    assert encoder.cached_bytes == 5 * L * 32 * 4


def test_cache_is_bounded(make_encoder):
    one_caption = L * 32 * 4
    encoder = make_encoder(cache_bytes=3 * one_caption)
    encoder([f"number {i}" for i in range(10)])
    assert encoder.cached_bytes == 3 * one_caption


def test_without_a_cache_nothing_is_kept(make_encoder):
    encoder = make_encoder(cache_bytes=0)
    sizes, outputs = count_passes(encoder), []
    encoder.model.register_forward_hook(
        lambda *args: outputs.append(weakref.ref(args[-1].last_hidden_state))
    )
    for _ in range(2):
        encoder(CAPTIONS)
    assert sizes == [4, 4]
    assert encoder.cached_bytes == 0
    assert [output() for output in outputs] == [None, None]


def test_a_cast_or_move_of_the_model_alone_empties_the_cache(make_encoder):
    encoder = make_encoder()
    encoder(CAPTIONS)
    encoder.model.double()
    assert encoder(CAPTIONS).prompt_embeds.dtype == torch.float64


def test_an_offloaded_model_is_read_where_it_computes(make_encoder):
    plain, encoder = make_encoder(), make_encoder()
    cpu_offload(encoder.model, execution_device=torch.device("cpu"))
    assert encoder.model.shared.weight.is_meta
    assert torch.equal(encoder(CAPTIONS).prompt_embeds, plain(CAPTIONS).prompt_embeds)


def test_captions_that_differ_beyond_the_budget_share_features(make_encoder):
    encoder = make_encoder(tokenizer=ByT5Tokenizer(extra_ids=0))
    sizes = count_passes(encoder)
    result = encoder(["x" * 100, "x" * 101])
    assert sizes == [1]
    assert result.report.dropped_tokens == (101 - L, 102 - L)


def test_changed_weights_are_noticed(make_encoder):
    encoder = make_encoder()
    before = encoder(CAPTIONS).prompt_embeds
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.mul_(2)
    assert torch.equal(encoder(CAPTIONS).prompt_embeds, 2 * before)
    encoder.model.load_state_dict(toy_t5(seed=1).state_dict())
    expected = make_encoder(toy_t5(seed=1))(CAPTIONS).prompt_embeds
    assert torch.equal(encoder(CAPTIONS).prompt_embeds, expected)


def test_casts_and_unnoticed_writes_can_clear_the_cache(make_encoder):
    encoder = make_encoder()
    before = encoder(CAPTIONS).prompt_embeds
    assert encoder.to(torch.float64)(CAPTIONS).prompt_embeds.dtype == torch.float64
    encoder.to(torch.float32)
    encoder.model.encoder.final_layer_norm.weight.data *= 2
    encoder.clear_cache()
    assert torch.equal(encoder(CAPTIONS).prompt_embeds, 2 * before)


def test_autocast_has_entries_of_its_own(make_encoder):
    encoder = make_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(CAPTIONS).prompt_embeds
    plain = encoder(CAPTIONS).prompt_embeds
    assert torch.equal(plain, make_encoder()(CAPTIONS).prompt_embeds)
    assert not torch.equal(low.float(), plain)


def test_features_cached_in_inference_mode_serve_training(make_encoder):
    encoder = make_encoder(adapter=toy_adapter())
    with torch.inference_mode():
        encoder(CAPTIONS)
    sizes = count_passes(encoder)
    encoder(CAPTIONS).prompt_embeds.sum().backward()
    assert sizes == []
    assert all(weight.grad is not None for weight in encoder.adapter.parameters())


def test_a_frozen_model_never_drops_out(make_encoder):
    encoder = make_encoder(toy_t5().train(), adapter=toy_adapter(), cache_bytes=0)
    assert torch.equal(encoder(CAPTIONS).prompt_embeds, encoder(CAPTIONS).prompt_embeds)
    encoder.train()
    assert encoder.adapter.training
    assert not encoder.model.training
    assert torch.equal(encoder(CAPTIONS).prompt_embeds, encoder(CAPTIONS).prompt_embeds)


def test_a_trainable_model_drops_out_and_is_not_cached(make_encoder):
    encoder = make_encoder(toy_t5().requires_grad_(True)).train()
    first, second = encoder(CAPTIONS).prompt_embeds, encoder(CAPTIONS).prompt_embeds
    assert not torch.equal(first, second)
    with torch.no_grad():
        assert not torch.equal(encoder(["a"]).prompt_embeds, encoder(["a"]).prompt_embeds)
    assert encoder.cached_bytes == 0
    first.sum().backward()
    assert encoder.model.shared.weight.grad.abs().sum() > 0


def test_gradient_flows_into_the_adapter_only(make_encoder):
    encoder = make_encoder(adapter=toy_adapter()).train()
    encoder(CAPTIONS).prompt_embeds.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in encoder.adapter.parameters())
    assert all(weight.grad is None for weight in encoder.model.parameters())


def test_gradient_is_the_same_with_and_without_the_cache(make_encoder):
    found = []
    for cache_bytes in (0, 2**20):
        encoder = make_encoder(adapter=toy_adapter(), cache_bytes=cache_bytes).train()
        for _ in range(2):
            encoder.zero_grad()
            encoder(CAPTIONS).prompt_embeds.square().sum().backward()
            found.append(gradients(encoder.adapter))
    for other in found[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0].items())


def test_a_trained_adapter_is_used_at_once(make_encoder):
    encoder = make_encoder(adapter=toy_adapter())
    before = encoder(CAPTIONS).prompt_embeds
    with torch.no_grad():
        encoder.adapter.ff2.net[2].bias += 1
    torch.testing.assert_close(encoder(CAPTIONS).prompt_embeds, before + 1)


def test_adapter_keeps_its_precision_beside_a_low_precision_model(make_encoder):
    encoder = make_encoder(toy_t5().to(torch.bfloat16), adapter=toy_adapter())
    result = encoder(CAPTIONS).prompt_embeds
    assert result.dtype == torch.float32
    result.sum().backward()
    assert encoder.adapter.norm1.weight.grad.dtype == torch.float32


def test_empty_caption_is_the_end_token_and_padding(make_encoder):
    encoder = make_encoder(adapter=toy_adapter())
    empty = encoder.encode_empty(3)
    assert empty.prompt_embeds.shape == (3, L, 16)
    assert empty.attention_mask.sum(dim=1).tolist() == [1, 1, 1]
    assert empty.report.kept_tokens == (1, 1, 1)
    assert torch.equal(empty.prompt_embeds[2], encoder(CAPTIONS).prompt_embeds[1])


def test_copies_start_with_an_empty_cache(make_encoder):
    encoder = make_encoder()
    result = encoder(CAPTIONS).prompt_embeds
    twin = copy.deepcopy(encoder)
    assert twin.cached_bytes == 0
    assert torch.equal(twin(CAPTIONS).prompt_embeds, result)


@pytest.mark.parametrize(
    "tokenizer", [toy_t5_tokenizer(), ByT5Tokenizer(extra_ids=0)], ids=["words", "bytes"]
)
@pytest.mark.parametrize(
    "caption", ["", " \n\t", "...", "\0", "a\0b", "\ud800", "a\udc00b", "x " * 100_000, "猫🐈"]
)
def test_any_string_is_encoded(make_encoder, tokenizer, caption):
    result = make_encoder(tokenizer=tokenizer)([caption])
    assert result.prompt_embeds.isfinite().all()
    kept, dropped = result.report.kept_tokens[0], result.report.dropped_tokens[0]
    assert kept + dropped == len(tokenizer(encodable_text(caption), verbose=False)["input_ids"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain “quotes” \uff21\uff22 &amp; \x07\n", "plain “quotes” \uff21\uff22 &amp; \x07\n"),
        ("a\0b\0", "ab"),
        ("a\ud800b", "a\ufffdb"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00!", "😀!"),
    ],
)
def test_only_what_is_no_text_is_repaired(text, expected):
    assert encodable_text(text) == expected


def test_no_captions_are_refused(make_encoder):
    with pytest.raises(ValueError, match="at least one caption"):
        make_encoder()([])


def test_settings_that_cannot_work_are_refused(make_encoder):
    with pytest.raises(ConfigError, match="`token_budget` must be at least 1; got 0"):
        make_encoder(token_budget=0)
    with pytest.raises(ConfigError, match=r"tokenizer's 259 tokens; its vocabulary has 100"):
        make_encoder(toy_t5(vocab_size=100), ByT5Tokenizer(extra_ids=0))
    with pytest.raises(ConfigError, match=r"input width 32.*got 48"):
        make_encoder(adapter=TextAdapter(48, 12, 16))
