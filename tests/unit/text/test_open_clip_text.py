import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

from segalign.errors import ConfigError
from segalign.text.clip_tower import ClipTower
from segalign.text.open_clip_text import OpenClipText
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.tokenizer import clip_tokenizer

TEXTS = ["a red cat", "", "a blue dog sits on the mat, far from the red cat", "one " * 75]


def make_model(kind=CLIP, *, embed_dim=24, quick_gelu=False, **text):
    vision = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=16, image_size=16)
    text_cfg = CLIPTextCfg(**{"width": 32, "heads": 4, "layers": 3, **text})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind(embed_dim, vision, text_cfg, quick_gelu=quick_gelu)
        for weight in model.parameters():
            weight.data.normal_(std=0.3)
    return model.eval().requires_grad_(False)


MODELS = {
    "clip": {},
    "quick_gelu": {"quick_gelu": True},
    "custom": {"kind": CustomTextCLIP},
    "custom_blocks": {"kind": CustomTextCLIP, "scale_attn": True, "ls_init_value": 0.5},
    "biased_projection": {"kind": CustomTextCLIP, "proj_bias": True},
    "no_projection": {"kind": CustomTextCLIP, "proj_type": "none"},
    "end_token": {"pool_type": "eos", "eos_id": 49407},
}


@pytest.fixture(params=MODELS)
def model(request):
    return make_model(**MODELS[request.param])


def ids_of(tower, texts=TEXTS):
    padded = [tower.wrap(tower.word_ids(text), padded=True) for text in texts]
    return torch.tensor(padded)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_pooled_features_are_those_of_encode_text(model):
    tower = ClipTower(OpenClipText(model), clip_tokenizer("!"))
    own = model.encode_text(ids_of(tower))
    scale = own.abs().max().item()
    close(tower.end_states(TEXTS), own, 2e-6 * scale)


@pytest.mark.parametrize("layer", [-1, -2])
def test_tokens_are_those_of_the_transformer(model, layer):
    tower = ClipTower(OpenClipText(model), clip_tokenizer("!"), layer=layer)
    part = getattr(model, "text", model)
    ids = ids_of(tower)
    embedded = part.token_embedding(ids) + part.positional_embedding
    last, layers = part.transformer.forward_intermediates(embedded, attn_mask=part.attn_mask)
    own = part.ln_final(last) if layer == -1 else layers[layer]
    sequences = [tower.wrap(tower.word_ids(text)) for text in TEXTS]
    features = tower(sequences)
    for row, sequence in zip(own, sequences, strict=True):
        close(features[sequence], row[: len(sequence)], 2e-6 * own.abs().max().item())


def test_pads_as_open_clip_does(model):
    import open_clip

    tower = ClipTower(OpenClipText(model), clip_tokenizer("!"))
    ours, theirs = ids_of(tower), open_clip.SimpleTokenizer()(TEXTS)
    assert torch.equal(ours, theirs)


def test_features_do_not_depend_on_the_batch(model):
    tower = ClipTower(OpenClipText(model), clip_tokenizer("!"), cache_bytes=0)
    many = [tower.wrap(tower.word_ids(f"{'a cat ' * (i % 9)} number {i}")) for i in range(40)]
    together = tower(many)
    for sequence in many[::9]:
        close(together[sequence], tower([sequence])[sequence], 5e-6)


def test_serves_a_segment_encoder():
    model = make_model()
    encoder = SegmentEncoder(OpenClipText(model), clip_tokenizer("!"), token_budget=30)
    result = encoder(["A red cat. A dog.", ""])
    assert result.prompt_embeds.shape == (2, 30, 32)
    close(result.pooled[1:], model.encode_text(ids_of(encoder.tower, [""])))
    assert encoder.double()(["A red cat."]).prompt_embeds.dtype == torch.float64


def test_weights_keep_open_clips_names():
    model = make_model()
    names = set(OpenClipText(model).state_dict())
    assert names < set(model.state_dict())
    assert not any(name.startswith("visual.") for name in names)
    assert "text_projection" in names


def test_gradients_reach_a_trainable_tower():
    tower = ClipTower(OpenClipText(make_model()).requires_grad_(True), clip_tokenizer("!"))
    tower.end_states(TEXTS).square().sum().backward()
    assert tower.text_model.layers[0].mlp.c_fc.weight.grad.abs().sum() > 0
    assert tower.text_model.text_projection.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_causal_mask": True}, "got one with bidirectional attention"),
        ({"embed_cls": True}, "got one that pools at a class token"),
        ({"vocab_size": 32000}, "got one with another tokenizer, of 32000 tokens"),
        ({"pool_type": "last"}, "got one that pools with `last`"),
        ({"pool_type": "eos"}, "got one that pools with `eos`"),
    ],
)
def test_refuses_other_towers_with_one_line(settings, message):
    model = make_model(CustomTextCLIP, **settings)
    with pytest.raises(ConfigError, match=message) as refusal:
        OpenClipText(model)
    assert "\n" not in str(refusal.value)


def test_refuses_a_tower_of_another_library(text_model):
    with pytest.raises(ConfigError, match="`CLIPTextModel`, which `open_clip` takes from another"):
        OpenClipText(text_model)
