"""Vision towers of transformers; the default is that of CMMD.

Dims: B images, d features, S side of the input.

Reference: arXiv 2401.09603.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

from segalign.diffusion.network_files import check_whole, reading
from segalign.formats.clip_scorer import load_clip_scorer
from segalign.hub import fetch
from segalign.json_text import parse_json
from segalign.metrics.extractors.towers import Tower, check_patches
from segalign.metrics.extractors.weight_files import digest_tensors

_WHAT: Final = "the vision tower"


class TransformersTower:
    """A vision tower of transformers: CLIP's with its projection, others as they pool.

    Args:
        model: Folder or hub id. Its mean and deviation of colours are taken, not its cropping.
        image_size: Side of the input; null is what the tower was trained on.
        unit: Scale features to length 1, as CMMD does.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14-336",
        image_size: int | None = None,
        unit: bool = True,
    ) -> None:
        self.model = model
        self.image_size = image_size
        self.unit = unit

    def load(self) -> Tower:
        """Read the weights.

        Raises:
            ConfigError: If they are not there or cannot be read.
            DataError: If they are damaged or foreign.
        """
        folder = fetch(self.model, what=_WHAT)
        with torch.inference_mode(False):
            network, pool, side, mean, std = _read(self.model, folder)
        side = self.image_size or side
        check_patches(side, _patch_of(network))
        return Tower(
            network,
            pool,
            image_size=side,
            mean=mean,
            std=std,
            unit=self.unit,
            details={
                "name": type(network).__name__,
                "library": "transformers",
                "weights": digest_tensors(network.state_dict()),
                "layer": "pooled, projected" if hasattr(network, "visual_projection") else "pooled",
            },
        )


_Parts = tuple[nn.Module, Callable[[Tensor], Tensor], int, Any, Any]


def _read(model: str, folder: Path) -> _Parts:
    """Read a tower: network, what pools it, its side, mean and deviation of colours."""
    with reading(_WHAT, folder):
        kind = parse_json((folder / "config.json").read_bytes()).get("model_type")
    return _read_clip(model) if kind == "clip" else _read_vision(folder, kind)


def _patch_of(network: nn.Module) -> int | None:
    """Return the side of the patches that a transformer cuts images into."""
    sides = {
        getattr(getattr(part, "config", None), "patch_size", None) for part in network.modules()
    }
    return next((side for side in sides if isinstance(side, int)), None)


def _read_clip(model: str) -> _Parts:
    """Take the image half of a whole CLIP model."""
    scorer = load_clip_scorer(model)
    parts = {
        "vision_model": scorer.model.vision_model,
        "visual_projection": scorer.model.visual_projection,
    }
    network = _ClipVision(parts)
    settings = scorer.image_settings
    return network, network, settings.image_size, settings.mean, settings.std


class _ClipVision(nn.ModuleDict):
    """The image half of CLIP."""

    def forward(self, images: Tensor) -> Tensor:
        states = self["vision_model"](pixel_values=images).pooler_output
        features: Tensor = self["visual_projection"](states)
        return features


def _read_vision(folder: Path, kind: str) -> _Parts:
    """Read a folder of a tower alone."""
    is_clip = kind == "clip_vision_model"
    reader: Any = CLIPVisionModelWithProjection if is_clip else AutoModel
    with reading(_WHAT, folder):
        network, info = reader.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        side = int(network.config.image_size)
        processors: Any = AutoImageProcessor
        processor = processors.from_pretrained(folder)
        mean, std = list(processor.image_mean), list(processor.image_std)
    check_whole(info, _WHAT, folder)

    def pool(images: Tensor) -> Tensor:
        output = network(pixel_values=images)
        features: Tensor = output.image_embeds if is_clip else output.pooler_output
        return features

    return network, pool, side, mean, std
