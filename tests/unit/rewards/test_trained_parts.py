"""What of a scorer is trained: last blocks, towers, adapters; and how memory is saved."""

import pytest
import torch

from segalign.errors import ConfigError
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.rewards.trained_parts import ScorerLora, TrainedParts, merge_adapters
from segalign.trainable import trainable_parameters

TEXTS = ["A red fox.", "It rains on the old house by the lake."]
IMAGE_END = ("vision_model.post_layernorm.", "visual_projection.")
TEXT_END = ("text_model.final_layer_norm.", "text_projection.")
LAYERS = ("vision_model.encoder.layers.", "text_model.encoder.layers.")


@pytest.fixture
def model(make_hugging_face):
    """Two blocks in each tower."""
    return make_hugging_face().model


def features(scorer, images):
    both = SegmentScorer(scorer, cache_bytes=0)
    return torch.cat([both.text_features(TEXTS), both.image_features(images)])


def trained_names(model, **settings):
    TrainedParts(**settings).apply(model)
    return set(trainable_parameters(model))


def names_below(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def test_the_default_trains_everything(model):
    assert trained_names(model) == {name for name, _ in model.named_parameters()}


EXPECTED = {
    (0, 0): (),
    (1, 0): (LAYERS[0] + "1.", *IMAGE_END),
    (0, 1): (LAYERS[1] + "1.", *TEXT_END),
    (2, 1): (LAYERS[0], *IMAGE_END, LAYERS[1] + "1.", *TEXT_END),
    (None, 0): ("vision_model.", "visual_projection."),
    (0, None): ("text_model.", "text_projection."),
}


@pytest.mark.parametrize("blocks", EXPECTED, ids=str)
def test_last_blocks_and_what_follows_them_are_trained(model, blocks):
    image_blocks, text_blocks = blocks
    found = trained_names(model, image_blocks=image_blocks, text_blocks=text_blocks)
    expected = names_below(model, *EXPECTED[blocks]) if EXPECTED[blocks] else set()
    assert found == expected | {"logit_scale"}


def test_the_temperature_can_stay(model):
    assert "logit_scale" not in trained_names(model, logit_scale=False)


@pytest.mark.parametrize(("tower", "count"), [("image_blocks", 3), ("text_blocks", -1)])
def test_a_tower_has_so_many_blocks(model, tower, count):
    message = (
        rf"^expected `trained\.{tower}` from 0 to 2, the tower's blocks; got {count}; null trains "
        r"the whole tower$"
    )
    with pytest.raises(ConfigError, match=message):
        TrainedParts(**{tower: count}).apply(model)


def test_settings_that_contradict_are_refused():
    with pytest.raises(ConfigError, match=r"^expected either .* got both; remove one$"):
        TrainedParts(lora=ScorerLora(), image_blocks=1)
    with pytest.raises(ConfigError, match=r"^expected `trained` to leave something to train; got "):
        TrainedParts(image_blocks=0, text_blocks=0, logit_scale=False)
    with pytest.raises(ConfigError, match=r"^expected `lora.rank` of at least 1; got 0; try 16$"):
        ScorerLora(rank=0)


@pytest.mark.parametrize("pattern", ["no_such_module", "("])
def test_adapters_fit_somewhere(model, pattern):
    with pytest.raises(ConfigError, match=r"^expected `lora\.target_modules` that match .* leave "):
        TrainedParts(lora=ScorerLora(target_modules=pattern)).apply(model)


def test_adapters_are_trained_in_place_of_all_linear_layers(make_hugging_face, images):
    scorer = make_hugging_face()
    before = features(scorer, images)
    TrainedParts(lora=ScorerLora(rank=3)).apply(scorer.model)
    trained = trainable_parameters(scorer.model)
    # Four of attention and two of the feed-forward part, in two blocks of two towers, A and B.
    assert len(trained) == 6 * 2 * 2 * 2 + 1
    assert all("lora_" in name for name in trained.keys() - {"logit_scale"})
    assert features(scorer, images).equal(before)


def test_adapters_are_float32_over_a_smaller_number_type(model):
    model.bfloat16()
    TrainedParts(lora=ScorerLora(), logit_scale=False).apply(model)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert model.text_projection.weight.dtype == torch.bfloat16


def test_merged_adapters_leave_the_model_as_it_was_built(make_hugging_face, images):
    scorer = make_hugging_face()
    names, before = set(scorer.model.state_dict()), features(scorer, images)
    TrainedParts(lora=ScorerLora(rank=3)).apply(scorer.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in trainable_parameters(scorer.model).values():
            weight += 0.2 * torch.randn_like(weight)
        tuned = features(scorer, images)
        adapted = scorer.model.text_model.encoder.layers[0].mlp.fc1
        low_rank = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
        expected = adapted.base_layer.weight + low_rank  # a scale of 1
        merge_adapters(scorer.model)
        merged = features(scorer, images)
    assert (tuned - before).abs().max() > 0.01
    assert (merged - tuned).abs().max() < 1e-6  # float32, added in another order
    torch.testing.assert_close(scorer.model.text_model.encoder.layers[0].mlp.fc1.weight, expected)
    assert set(scorer.model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("settings", [{}, {"lora": ScorerLora(rank=2)}], ids=["whole", "lora"])
def test_checkpointing_recomputes_and_changes_nothing(make_hugging_face, images, settings):
    grads, calls = {}, {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        scorer = make_hugging_face()
        model = scorer.model.double().train()
        TrainedParts(**settings, gradient_checkpointing=checkpointing).apply(model)
        counted = calls[checkpointing] = []
        for tower in (model.vision_model, model.text_model):
            for block in tower.encoder.layers:
                block.mlp.register_forward_pre_hook(lambda *_, c=counted: c.append(1))
        found = features(scorer, images.double())
        (found @ found.T).exp().sum().backward()
        grads[checkpointing] = {n: p.grad for n, p in trainable_parameters(model).items()}
    assert len(calls[True]) == 2 * len(calls[False])
    compared = [name for name, grad in grads[False].items() if grad is not None]
    assert len(compared) == len(grads[False]) - 1  # all but the temperature
    for name in compared:
        assert (grads[True][name] - grads[False][name]).abs().max() <= 1e-12, name
    assert any(grads[False][name].any() for name in compared)
