"""LPIPS: torchvision's backbones and the published heads, both as files that we read.

Dims: B images, H/W pixels, C channels of a stage.

Reference: arXiv 1801.03924, version 0.1 of the heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models  # type: ignore[import-untyped]

from segalign.errors import ConfigError
from segalign.metrics.extractors.weight_files import (
    PublishedFile,
    WeightFile,
    read_weights,
    unusable,
)
from segalign.metrics.perceptual.stages import StageNet

LpipsNet = Literal["alex", "vgg", "squeeze"]

_SHIFT: Final = (-0.030, -0.088, -0.188)
_SCALE: Final = (0.458, 0.448, 0.450)
_HEADS: Final = "the heads of LPIPS"


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision as LPIPS uses it.

    Attributes:
        build: Makes it, untrained.
        ends: Where each stage ends in its ``features``.
        published: Its weights.
        heads_sha256: Digest of the published heads.
        min_side: Smallest image that leaves something to every stage, in pixels.
    """

    build: Callable[..., Any]
    ends: tuple[int, ...]
    published: PublishedFile
    heads_sha256: str
    min_side: int


BACKBONES: Final[dict[LpipsNet, Backbone]] = {
    "alex": Backbone(
        build=models.alexnet,
        ends=(2, 5, 8, 10, 12),
        published=PublishedFile(
            what="the weights of AlexNet",
            url=models.AlexNet_Weights.IMAGENET1K_V1.url,
            sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        ),
        heads_sha256="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
        min_side=31,
    ),
    "vgg": Backbone(
        build=models.vgg16,
        ends=(4, 9, 16, 23, 30),
        published=PublishedFile(
            what="the weights of VGG16",
            url=models.VGG16_Weights.IMAGENET1K_V1.url,
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        ),
        heads_sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        min_side=16,
    ),
    "squeeze": Backbone(
        build=models.squeezenet1_1,
        ends=(2, 5, 8, 10, 11, 12, 13),
        published=PublishedFile(
            what="the weights of SqueezeNet 1.1",
            url=models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
            sha256="b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        ),
        heads_sha256="4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
        min_side=17,
    ),
}


class Lpips:
    """The perceptual distance LPIPS, version 0.1.

    Args:
        net: Backbone; ``alex`` is its authors' choice for metrics, and much the cheapest.
        weights: File of the backbone's weights, torchvision's ``.pth`` or ``.safetensors``; null is
            the published one in the cache of torch hub.
        heads: File of the heads; null is the one that comes with torchmetrics.
        resize: Side to which images are resized first, bilinear with antialiasing; null leaves
            them. Distances of another size are other numbers.
        download: Download the published weights if they are not there.
    """

    def __init__(
        self,
        net: LpipsNet = "alex",
        weights: str | None = None,
        heads: str | None = None,
        resize: int | None = None,
        download: bool = False,
    ) -> None:
        if net not in get_args(LpipsNet):
            raise ConfigError(f"expected `net` to be `alex`, `vgg` or `squeeze`; got `{net}`")
        smallest = BACKBONES[net].min_side
        if resize is not None and resize < smallest:
            raise ConfigError(
                f"expected `resize` of at least {smallest} pixels for `{net}`; got {resize}; "
                "raise it, or set it to null"
            )
        self.net: LpipsNet = net
        self.weights = weights
        self.heads = heads
        self.resize = resize
        self.download = download

    def load(self) -> StageNet:
        """Read both files: see ``PerceptualSource``."""
        backbone = BACKBONES[self.net]
        published = backbone.published
        file = read_weights(published.find(self.weights, download=self.download), published.what)
        heads = read_weights(self._heads_path(), _HEADS)
        is_published = file.is_published(published)
        details = {
            "name": f"lpips-0.1-{self.net}",
            "weights": file.sha256,
            "heads": heads.sha256,
            "verified": is_published and heads.sha256 == backbone.heads_sha256,
            "layer": f"{len(backbone.ends)} stages",
            "resize": "none" if self.resize is None else "bilinear, antialiased",
            "input_size": self.resize,
        }
        layers, stages = _build_stages(backbone)
        channel_weights = _take_heads(heads, _count_channels(stages))
        _fill(layers, file)
        return StageNet(stages, channel_weights, self._prepare, details)

    def _heads_path(self) -> Path:
        if self.heads is not None:
            return Path(self.heads).expanduser()
        package = files("torchmetrics.functional.image") / "lpips_models"
        return Path(str(package / f"{self.net}.pth"))

    def _prepare(self, pixels: Tensor) -> Tensor:
        """Map to [-1, 1], resize if asked, normalise."""
        images = pixels.float() / 127.5 - 1
        side = BACKBONES[self.net].min_side
        if self.resize is not None:
            size = (self.resize, self.resize)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        elif min(images.shape[-2:]) < side:
            raise ConfigError(
                f"expected images of at least {side} pixels for LPIPS with `{self.net}`; got "
                f"{images.shape[-1]} x {images.shape[-2]}; set its `resize`"
            )
        return (images - _of_colours(_SHIFT, images)) / _of_colours(_SCALE, images)


def _of_colours(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(3, 1, 1)


def _build_stages(backbone: Backbone) -> tuple[nn.Sequential, nn.Sequential]:
    """Cut the backbone's convolutions into stages, all of shape alone.

    Returns:
        The convolutions, and the stages, which share their layers.
    """
    with torch.device("meta"):
        layers: nn.Sequential = backbone.build(weights=None).features.float()
    starts = (0, *backbone.ends[:-1])
    slices = (layers[start:end] for start, end in zip(starts, backbone.ends, strict=True))
    return layers, nn.Sequential(*slices)


def _count_channels(stages: nn.Sequential) -> list[int]:
    """Count the channels that each stage gives; the stages are of shape alone."""
    states = torch.empty(1, 3, 64, 64, dtype=torch.float32, device="meta")
    widths = []
    for stage in stages:
        states = stage(states)
        widths.append(states.shape[1])
    return widths


def _fill(layers: nn.Sequential, file: WeightFile) -> None:
    """Give the convolutions their weights; those of a classifier may be in the file."""
    file.fill(
        layers,
        {
            name.removeprefix("features."): tensor
            for name, tensor in file.tensors.items()
            if not name.startswith("classifier.")
        },
    )


def _take_heads(file: WeightFile, widths: list[int]) -> list[Tensor]:
    """Take the weights of channels, ``(C,)`` for each stage."""
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    expected = {f"lin{stage}.model.1.weight": (1, w, 1, 1) for stage, w in enumerate(widths)}
    if shapes != expected:
        raise unusable(file.path, file.what, f"others than {len(widths)}, or of other widths")
    return [file.tensors[name].flatten() for name in expected]
