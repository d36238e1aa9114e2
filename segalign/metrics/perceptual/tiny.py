"""A perceptual distance of seeded weights in place of LPIPS: for tests and scenes.

Dims: B images.
"""

from typing import Final

import torch

from segalign.metrics.extractors.tiny import draw_he, tiny_input, tiny_stages
from segalign.metrics.extractors.weight_files import digest_tensors
from segalign.metrics.perceptual.stages import StageNet

_WIDTHS: Final = (16, 32, 64)


class TinyPerceptual:
    """A distance as LPIPS computes it, on a small network that has learned nothing, in [0, 2].

    Args:
        seed: Seed of its weights; global random numbers do not matter, and are not drawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def load(self) -> StageNet:
        """Draw the weights; all channels and stages count alike."""
        with torch.device("meta"):
            stages = tiny_stages(*_WIDTHS)
        draw_he(stages, "tiny perceptual", self.seed)
        heads = [torch.full((width,), 1 / len(_WIDTHS), dtype=torch.float32) for width in _WIDTHS]
        details = {
            "name": "tiny random network (no LPIPS of others compares)",
            "weights": digest_tensors(stages.state_dict()),
            "heads": "equal",
            "layer": f"{len(_WIDTHS)} stages",
            "resize": "none",
            "input_size": None,
        }
        return StageNet(stages, heads, tiny_input, details)
