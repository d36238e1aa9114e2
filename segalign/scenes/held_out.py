"""The held-out scorer of scenes: a ResNet and a text tower of ``open_clip``.

Dims: B batch, C channels, g cells along a side, E joint-embedding width, H/W pixels.
"""

import math

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
_CHANNELS = (32, 64, 96)


class ConvImageTower(nn.Module):
    """A small ResNet whose map, one place per cell of the scene, is read by one linear layer.

    The places stay apart: a mean over them would forget which cell holds what.

    Args:
        num_cells: Cells along a side of the image, g.
    """

    def __init__(self, num_cells: int) -> None:
        super().__init__()
        config = ResNetConfig(
            embedding_size=_CHANNELS[0],
            hidden_sizes=list(_CHANNELS),
            depths=[1, 2, 2],
            layer_type="basic",
        )
        self.trunk = ResNetModel(config)
        self.norm = nn.LayerNorm(_CHANNELS[-1])
        self.head = nn.Linear(_CHANNELS[-1] * num_cells**2, _WIDTH, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised images ``(B, 3, H, W)`` of 12 g pixels, ``(B, E)``."""
        places = self.trunk(pixel_values=pixels).last_hidden_state  # (B, C, g, g)
        features: Tensor = self.head(self.norm(places.flatten(2).mT).flatten(1))
        return features


class HeldOutModel(nn.Module):
    """The two towers, under the names that ``open_clip`` gives them.

    Args:
        num_cells: Cells along a side of the image.
    """

    def __init__(self, num_cells: int) -> None:
        super().__init__()
        self.visual = ConvImageTower(num_cells)
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
    place = get_world(world)
    model = HeldOutModel(place.num_rows)
    state = read_weights(source, HELD_OUT, HELD_OUT_PREFIXES, world)
    if state is not None:
        fill_weights(model, state, source)
    middle = (0.5, 0.5, 0.5)
    settings = ImageSettings(image_size=place.image_size, mean=middle, std=middle)
    return open_clip_scorer(model, settings)
