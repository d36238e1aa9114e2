"""Tiny CLIP-type models of both libraries."""

import copy
import functools

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from transformers import CLIPConfig, CLIPModel

from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.formats.open_clip_scorer import OpenClipScorer, open_clip_scorer
from segalign.text.tokenizer import VOCAB_SIZE, clip_tokenizer

VIT = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
# Every way in which open_clip's image towers come to one vector.
IMAGE_TOWERS = {
    "class_token": VIT,
    "average": {**VIT, "pool_type": "avg"},
    "attention": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2},
    "resnet": {"layers": (1, 1, 1, 1), "width": 4, "head_width": 8, "image_size": 64},
    "timm_cnn": {"timm_model_name": "test_convnext", "image_size": 64},
    "timm_vit": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token"},
}  # fmt: skip


@functools.cache
def hugging_face() -> ClipScorer:
    torch.manual_seed(0)
    tower = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    ids = {"bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
    config = CLIPConfig(
        text_config={**tower, **ids, "vocab_size": VOCAB_SIZE},
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    model = CLIPModel(config).eval()
    return ClipScorer(model, clip_tokenizer(), ImageSettings(image_size=16))


@functools.cache
def open_clip_of(tower: str, custom: bool) -> OpenClipScorer:
    text = CLIPTextCfg(width=16, heads=2, layers=2)
    kind = CustomTextCLIP if custom else CLIP
    torch.manual_seed(1)
    return open_clip_scorer(kind(12, CLIPVisionCfg(**IMAGE_TOWERS[tower]), text).eval())


def own_model(scorer):
    """Give a test weights of its own."""
    return scorer._replace(model=copy.deepcopy(scorer.model))


def new_hugging_face() -> ClipScorer:
    return own_model(hugging_face())


def new_open_clip(tower: str = "class_token", *, custom: bool = False) -> OpenClipScorer:
    return own_model(open_clip_of(tower, custom))


SCORERS = {"hugging_face": new_hugging_face, "open_clip": new_open_clip}


@pytest.fixture(params=SCORERS)
def any_scorer(request):
    return SCORERS[request.param]()


@pytest.fixture(params=IMAGE_TOWERS)
def open_clip_model(request):
    """A scorer of open_clip with each kind of image tower, and each kind of text tower."""
    return new_open_clip(request.param, custom=request.param in ("average", "timm_cnn"))


@pytest.fixture
def make_hugging_face():
    return new_hugging_face


@pytest.fixture
def make_open_clip():
    return new_open_clip


@pytest.fixture
def images():
    return torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(1))
