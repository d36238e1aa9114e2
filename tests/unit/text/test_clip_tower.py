import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.initialization import no_init_weights

from segalign.errors import ConfigError
from segalign.text.clip_tower import ClipTower

TEXTS = ["a red cat", "a blue dog sits on the mat", "", "a red cat", "one two three four " * 12]


@pytest.fixture
def make_tower(make_text_model, tokenizer):
    def make(model=None, **settings):
        return ClipTower(model or make_text_model(), tokenizer, **settings)

    return make


def pooled_of(features, sequence):
    return features.pooled[features.pooled_rows[sequence]]


def sequences(tower, texts=TEXTS):
    return [tower.wrap(tower.word_ids(text)) for text in texts]


def count_passes(tower):
    """Record the shape of the ids of each pass."""
    shapes = []
    tower.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_features_equal_the_models_own(make_tower):
    tower = make_tower()
    for sequence in sequences(tower):
        own = tower.text_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        torch.testing.assert_close(tower([sequence])[sequence], own, rtol=0, atol=5e-6)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "projecting"])
def test_features_are_the_same_to_the_last_bit_in_every_batch(
    make_tower, num_threads, kind, projecting_model
):
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        model, layer = (projecting_model, -2) if kind == "projecting" else (None, -1)
        tower = make_tower(model, cache_bytes=0, layer=layer)
        many = sequences(tower, [f"{'a red cat ' * (i % 9)} number {i}" for i in range(60)])
        together = tower(many)
        for sequence in many[::7]:
            alone = tower([sequence])
            assert torch.equal(together[sequence], alone[sequence])
            assert torch.equal(pooled_of(together, sequence), pooled_of(alone, sequence))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def wide_model():
    """One layer of CLIP-L's width: there kernels of 3, 5 or 6 rows sum in another order."""
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=1,
        num_attention_heads=12,
        vocab_size=49408,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    with no_init_weights():
        model = CLIPTextModel(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            weight.data = torch.randn(64, 768).repeat(772, 1) if "token" in name else weight.data
            if "token" not in name:
                weight.data.normal_(std=0.05)
    return model.eval().requires_grad_(False)


def test_short_sequences_are_the_same_to_the_last_bit_at_full_width(make_tower, wide_model):
    tower = make_tower(wide_model, cache_bytes=0)
    many = sequences(tower, ["", "cat", "dog", *("cat " * n + f"dog {n}" for n in range(1, 9))])
    together = tower(many)
    for sequence in many:
        assert torch.equal(together[sequence], tower([sequence])[sequence])


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_layers_and_pooled_features_are_the_models_own(
    make_tower, projecting_model, layer, cache_bytes
):
    tower = make_tower(projecting_model, layer=layer, cache_bytes=cache_bytes)
    wrapped = [*sequences(tower), tower.wrap(tower.word_ids("a red cat"), padded=True)]
    features = tower(wrapped)
    for sequence in wrapped:
        ids = torch.tensor([sequence])
        own = projecting_model(input_ids=ids, output_hidden_states=True)
        states = own.last_hidden_state if layer == -1 else own.hidden_states[layer]
        torch.testing.assert_close(features[sequence], states[0], rtol=0, atol=5e-6)
        pooled = pooled_of(features, sequence)
        torch.testing.assert_close(pooled, own.text_embeds[0], rtol=0, atol=2e-5)


def test_the_end_token_is_the_first_one_of_a_padded_sequence(make_tower):
    tower = make_tower()
    plain, padded = (tower.wrap(tower.word_ids("a red cat"), padded=p) for p in (False, True))
    features = tower([plain, padded])
    torch.testing.assert_close(
        pooled_of(features, plain), pooled_of(features, padded), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("layer", [-1, -2])
def test_an_offloaded_model_is_called_as_a_whole(make_tower, projecting_model, layer):
    plain = make_tower(copy.deepcopy(projecting_model), layer=layer)
    tower = make_tower(projecting_model, layer=layer)
    expected = plain(sequences(plain))
    cpu_offload(projecting_model, execution_device=torch.device("cpu"))
    assert projecting_model.text_projection.weight.is_meta
    shapes = count_passes(tower)
    features = tower(sequences(tower))
    assert len(shapes) > 0
    assert torch.equal(features.rows, expected.rows)
    assert torch.equal(features.pooled, expected.pooled)


def test_no_hook_stays_on_the_model(make_tower, projecting_model):
    tower = make_tower(projecting_model, layer=-2)
    tower(sequences(tower))
    layers = projecting_model.text_model.encoder.layers
    assert not any(layer._forward_hooks for layer in layers)


@pytest.mark.parametrize("layer", [0, 1, -4])
def test_refuses_a_layer_that_is_not_there(make_tower, projecting_model, layer):
    with pytest.raises(ConfigError, match=rf"-1 \(after the final norm\) to -3 .* got {layer};"):
        make_tower(projecting_model, layer=layer)


@pytest.mark.parametrize("layer", [-1, -2])
def test_gradients_reach_a_projecting_model(make_tower, projecting_model, layer):
    tower = make_tower(projecting_model.requires_grad_(True), layer=layer)
    features = tower(sequences(tower))
    features.rows.square().sum().backward(retain_graph=True)
    assert projecting_model.text_projection.weight.grad is None
    features.pooled.square().sum().backward()
    assert projecting_model.text_projection.weight.grad.abs().sum() > 0
    first = projecting_model.text_model.encoder.layers[0].mlp.fc1.weight.grad
    assert first.abs().sum() > 0


def test_equal_sequences_are_encoded_once(make_tower):
    tower = make_tower(cache_bytes=0)
    shapes = count_passes(tower)
    tower(sequences(tower, [chr(ord("a") + i % 20) for i in range(400)]))
    assert shapes == [(20, 4)]


def test_sequences_of_like_length_share_a_pass(make_tower):
    tower = make_tower(cache_bytes=0, width_step=8)
    shapes = count_passes(tower)
    tower(sequences(tower, ["cat " * n for n in range(1, 76)] + ["dog " * n for n in range(1, 76)]))
    assert [width for _, width in shapes] == [8, 16, 24, 32, 40, 48, 56, 64, 72, 77]


def test_passes_are_bounded(make_tower):
    tower = make_tower(cache_bytes=0, max_pass_tokens=80)
    shapes = count_passes(tower)
    tower(sequences(tower, [f"number {i}" for i in range(70)]))
    assert len(shapes) > 1
    assert all(rows * width <= 80 for rows, width in shapes)


def test_cached_features_are_equal_and_spare_the_model(make_tower):
    cached, plain = make_tower(), make_tower(cache_bytes=0)
    shapes = count_passes(cached)
    first = cached(sequences(cached))
    num_passes = len(shapes)
    again = cached(sequences(cached)[::-1])
    assert len(shapes) == num_passes > 0
    fresh = plain(sequences(plain))
    for sequence in sequences(cached):
        assert torch.equal(first[sequence], fresh[sequence])
        assert torch.equal(again[sequence], fresh[sequence])


def test_cache_memory_is_bounded(make_tower):
    bound = 20_000
    tower, plain = make_tower(cache_bytes=bound), make_tower(cache_bytes=0)
    for i in range(40):
        (sequence,) = sequences(tower, [f"picture number {i}"])
        assert torch.equal(tower([sequence])[sequence], plain([sequence])[sequence])
        assert tower.cached_bytes <= bound
    assert tower.cached_bytes > bound // 2
    entries = (features for features, _ in tower._features._cache._entries.values())
    held = sum(tensor.untyped_storage().nbytes() for pair in entries for tensor in pair)
    assert held == tower.cached_bytes  # no view keeps a whole pass alive


def features_of(tower, text="a red cat"):
    (sequence,) = sequences(tower, [text])
    return tower([sequence])[sequence]


def load(tower, other):
    tower.text_model.load_state_dict(other.state_dict())


def assign(tower, other):
    tower.text_model.load_state_dict(other.state_dict(), assign=True)


def write_in_place(tower, other):
    with torch.no_grad():
        for weight, new in zip(tower.text_model.parameters(), other.parameters(), strict=True):
            weight.copy_(new)


def write_data(tower, other):
    for weight, new in zip(tower.text_model.parameters(), other.parameters(), strict=True):
        weight.data.copy_(new.data)
    tower.clear_cache()


@pytest.mark.parametrize("change", [load, assign, write_in_place, write_data])
def test_changed_weights_invalidate_the_cache(make_tower, make_text_model, change):
    tower, other = make_tower(), make_text_model(seed=1)
    before = features_of(tower)
    change(tower, other)
    after = features_of(tower)
    assert not torch.equal(before, after)
    assert torch.equal(after, features_of(make_tower(make_text_model(seed=1))))


def test_a_cast_invalidates_the_cache(make_tower):
    tower = make_tower()
    features_of(tower)
    assert features_of(tower.double()).dtype == torch.float64


def test_a_cast_of_the_model_alone_invalidates_the_cache(make_tower):
    tower = make_tower()
    features_of(tower)
    tower.text_model.double()
    assert features_of(tower).dtype == torch.float64


def test_autocast_has_its_own_entries(make_tower):
    tower = make_tower()
    plain = features_of(tower)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = features_of(tower)
    assert not torch.equal(plain, rounded)
    assert torch.equal(plain, features_of(tower))


def test_a_trainable_model_is_not_cached_and_has_gradients(make_tower):
    tower = make_tower()
    tower.text_model.requires_grad_(True)
    features_of(tower).sum().backward()
    assert tower.cached_bytes == 0
    grads = [weight.grad for weight in tower.text_model.encoder.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_a_trained_model_is_cached_between_steps_only(make_tower):
    tower = make_tower()
    tower.text_model.requires_grad_(True)
    with torch.no_grad():
        before = features_of(tower)
        assert tower.cached_bytes > 0
    optimizer = torch.optim.SGD(tower.text_model.parameters(), lr=0.1)
    features_of(tower).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(before, features_of(tower))


def test_dropout_is_not_cached(make_tower, make_text_model):
    model = make_text_model()
    model.config.attention_dropout = 0.5
    for layer in model.encoder.layers:
        layer.self_attn.dropout = 0.5
    tower = make_tower(model).train()
    assert not torch.equal(features_of(tower), features_of(tower))


def test_features_made_in_inference_mode_serve_training(make_tower):
    tower = make_tower()
    with torch.inference_mode():
        features_of(tower)
    scale = torch.ones((), requires_grad=True)
    (features_of(tower) * scale).sum().backward()
    assert scale.grad is not None


def test_a_copy_does_not_share_the_cache(make_tower):
    tower = make_tower()
    features_of(tower)
    assert copy.deepcopy(tower).cached_bytes == 0


def test_end_states_equal_the_models_pooled_output(make_tower, text_model, tokenizer):
    tower = make_tower()
    texts = ["a red cat", "a dog", "a red cat", "number " * 100]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    own = text_model(input_ids=batch.input_ids).pooler_output
    torch.testing.assert_close(tower.end_states(texts), own, rtol=0, atol=5e-6)


def test_refuses_a_model_of_another_vocabulary(tokenizer, make_text_model):
    model = make_text_model()
    model.config.vocab_size = 1000
    with pytest.raises(ConfigError, match="49408 tokens; its vocabulary has 1000"):
        ClipTower(model, tokenizer)


def test_refuses_no_text(make_tower):
    with pytest.raises(ValueError, match="at least one text"):
        make_tower()([])
