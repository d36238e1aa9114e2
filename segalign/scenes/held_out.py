"""The held-out scorer of scenes: a ResNet and a text tower of ``open_clip``.

Dims: B batch, C channels, m places along a side of the map, E joint-embedding width, S pixels.
"""

import math
from typing import Any

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from segalign.formats.clip_scorer import ImageSettings
from segalign.formats.open_clip_scorer import OpenClipScorer, open_clip_scorer
from segalign.scenes.weights import fill_weights, read_weights
from segalign.scenes.world import get_world
from segalign.text.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE

HELD_OUT = "held_out_scorer"
HELD_OUT_PREFIXES = ("scorer.model.", "model.")
_WIDTH = 128
_CHANNELS = (32, 64, 64)
_STRIDE = 8


class ConvImageTower(nn.Module):
    """A small ResNet whose whole map is read by one linear layer.

    Its places stay apart: a mean over them would forget which cell holds what. There is no max
    pooling, which would blur the shapes of objects of six pixels.

    Args:
        image_size: Side of the images in pixels, S.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        config = ResNetConfig(
            embedding_size=_CHANNELS[0],
            hidden_sizes=list(_CHANNELS),
            depths=[1, 1, 2],
            layer_type="basic",
        )
        trunk: Any = ResNetModel(config)
        trunk.embedder.pooler = nn.Identity()
        self.trunk = trunk
        self.norm = nn.LayerNorm(_CHANNELS[-1])
        num_places = math.ceil(image_size / _STRIDE) ** 2
        self.head = nn.Linear(_CHANNELS[-1] * num_places, _WIDTH, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised images ``(B, 3, S, S)``, ``(B, E)``."""
        places = self.trunk(pixel_values=pixels).last_hidden_state  # (B, C, m, m)
        features: Tensor = self.head(self.norm(places.flatten(2).mT).flatten(1))
        return features


class HeldOutModel(nn.Module):
    """The two towers, under the names that ``open_clip`` gives them.

    Args:
        image_size: Side of the images in pixels.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.visual = ConvImageTower(image_size)
        self.text = TextTransformer(
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            width=48,
            heads=4,
            layers=3,
            output_dim=_WIDTH,
        )
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))


def load_held_out(world: str, source: str) -> OpenClipScorer:
    """Build the held-out scorer and read its weights (``shipped``, ``random`` or a run)."""
    side = get_world(world).image_size
    model = HeldOutModel(side)
    state = read_weights(source, HELD_OUT, HELD_OUT_PREFIXES, world)
    if state is not None:
        fill_weights(model, state, source)
    middle = (0.5, 0.5, 0.5)
    settings = ImageSettings(image_size=side, mean=middle, std=middle)
    return open_clip_scorer(model, settings)
