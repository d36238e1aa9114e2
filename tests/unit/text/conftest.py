import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from segalign.text.tokenizer import clip_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return clip_tokenizer()


@pytest.fixture
def make_text_model():
    """Build a random text model of width 32 and 2 layers, frozen."""

    def make(seed=0):
        config = CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=49408,
            bos_token_id=49406,
            eos_token_id=49407,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = CLIPTextModel(config)
            # The usual initial scale of 0.02 would make all features nearly equal.
            for weight in model.parameters():
                weight.data.normal_(std=0.3)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def text_model(make_text_model):
    return make_text_model()


@pytest.fixture
def projecting_model():
    """A frozen random model as SDXL's second: width 40, 3 layers, pooled states mapped to 24."""
    config = CLIPTextConfig(
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=49408,
        projection_dim=24,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = CLIPTextModelWithProjection(config)
        for weight in model.parameters():
            weight.data.normal_(std=0.3)
    return model.eval().requires_grad_(False)
