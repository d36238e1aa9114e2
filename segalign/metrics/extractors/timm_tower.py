"""Vision towers of timm; the default is that of FD-DINOv2.

Dims: B images, N tokens, d features, h/w places of a feature map, S side of the input.

Reference: arXiv 2306.04675.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, get_args

import timm
import torch
from torch import Tensor, nn

from segalign.errors import ConfigError
from segalign.hub import fetch
from segalign.metrics.extractors.towers import Tower, check_patches
from segalign.metrics.extractors.weight_files import WeightFile, read_weights

TimmPool = Literal["model", "token", "mean"]

_FILE: Final = "model.safetensors"


class TimmTower:
    """A vision tower of timm, without its classifier.

    Args:
        model: Architecture and, after the dot, training, as timm names them.
        weights: File of its weights (safetensors, or what ``torch.save`` wrote), or a folder or hub
            id that holds ``model.safetensors``; null is ``timm/MODEL`` of the hub.
        image_size: Side of the input; null is what the tower was trained on. The published
            FD-DINOv2 takes 224, to which the tower's places are interpolated.
        pool: ``model`` pools as the tower does, ``token`` takes the first token, ``mean`` averages
            over patches or places.
        unit: Scale features to length 1.
    """

    def __init__(
        self,
        model: str = "vit_large_patch14_dinov2.lvd142m",
        weights: str | None = None,
        image_size: int | None = 224,
        pool: TimmPool = "model",
        unit: bool = False,
    ) -> None:
        if pool not in get_args(TimmPool):
            raise ConfigError(f"expected `pool` to be `model`, `token` or `mean`; got `{pool}`")
        self.model = model
        self.weights = weights
        self.image_size = image_size
        self.pool: TimmPool = pool
        self.unit = unit

    def load(self) -> Tower:
        """Read the weights.

        Raises:
            ConfigError: If timm has no such model, it cannot take such images, or the weights are
                not there.
            DataError: If the weights are damaged or foreign.
        """
        if not timm.is_model(self.model):
            raise ConfigError(
                f"expected a model of timm; got `{self.model}`; `timm.list_models()` names them"
            )
        file = read_weights(self._find(), f"the weights of timm's `{self.model}`")
        network = _build(self.model)
        config = network.pretrained_cfg
        _fill(network, file, config.get("classifier"))
        side = self.image_size or config["input_size"][-1]
        check_patches(side, _patch_of(network))
        if side != config["input_size"][-1] and hasattr(network, "set_input_size"):
            network.set_input_size(img_size=(side, side))
        return Tower(
            network,
            _pooling(network, self.pool),
            image_size=side,
            mean=config["mean"],
            std=config["std"],
            unit=self.unit,
            details={
                "name": f"timm {self.model}",
                "library": "timm",
                "weights": file.sha256,
                "layer": f"last, pooled by {self.pool}",
            },
        )

    def _find(self) -> Path:
        source = self.weights or f"timm/{self.model}"
        path = Path(source).expanduser()
        return path if path.is_file() else fetch(source, what="the vision tower") / _FILE


def _build(model: str) -> Any:
    """Make the network; timm draws its weights, and global random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):
        return timm.create_model(model, num_classes=0).float()


def _patch_of(network: Any) -> int | None:
    """Return the side of the patches that a transformer cuts images into."""
    sides = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    return int(sides[0]) if isinstance(sides, tuple) else None


def _fill(network: nn.Module, file: WeightFile, classifier: str | tuple[str, ...] | None) -> None:
    """Give the network its weights; those of a classifier may be in the file."""
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    heads = tuple(f"{name}." for name in names)
    known = network.state_dict()
    tensors = {
        name: tensor
        for name, tensor in file.tensors.items()
        if name in known or not name.startswith(heads)
    }
    file.fill(network, tensors)


def _pooling(network: Any, pool: TimmPool) -> Callable[[Tensor], Tensor]:
    """Choose how images ``(B, 3, S, S)`` become features ``(B, d)``."""

    def pooled(images: Tensor) -> Tensor:
        states: Tensor = network.forward_features(images)
        num_prefix = getattr(network, "num_prefix_tokens", 0)
        if pool == "token":
            if states.ndim != 3 or not num_prefix:
                raise ConfigError(
                    "expected a tower with a class token for `pool: token`; this one has none; "
                    "choose `mean` or `model`"
                )
            return states[:, 0]
        if states.ndim == 3:
            return states[:, num_prefix:].mean(dim=1)
        return states.mean(dim=(2, 3))

    return network if pool == "model" else pooled
