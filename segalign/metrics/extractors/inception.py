"""The Inception network of FID, IS and KID: torch-fidelity's, with weights that we read.

Dims: B images, H/W pixels.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.metrics.extractors.frozen import FrozenNetwork
from segalign.metrics.extractors.protocol import Features
from segalign.metrics.extractors.resizing import pil_bicubic, tensorflow_bilinear
from segalign.metrics.extractors.weight_files import PublishedFile, read_weights

InceptionResize = Literal["legacy", "clean"]

INPUT_SIZE: Final = 299
PUBLISHED: Final = PublishedFile(
    what="the weights of Inception",
    url=URL_INCEPTION_V3,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
_RESIZES: Final = {"legacy": tensorflow_bilinear, "clean": pil_bicubic}


class InceptionV3:
    """Inception as TensorFlow had it in December 2015: 2048 features and 1008 class scores.

    ``legacy`` gives the numbers of the first FID code, pytorch-fid and torch-fidelity; ``clean``
    the better ones of clean-fid. Numbers of the two must never be compared.

    Args:
        weights: File of torch-fidelity's weights, ``.pth`` or ``.safetensors``; null is the
            published one in the cache of torch hub.
        resize: ``legacy`` is bilinear without antialiasing, ``clean`` bicubic with it.
        download: Download the published weights if they are not there.
    """

    def __init__(
        self,
        weights: str | None = None,
        resize: InceptionResize = "legacy",
        download: bool = False,
    ) -> None:
        if resize not in get_args(InceptionResize):
            raise ConfigError(f"expected `resize` to be `legacy` or `clean`; got `{resize}`")
        self.weights = weights
        self.resize: InceptionResize = resize
        self.download = download

    def load(self) -> "InceptionExtractor":
        """Read the weights.

        Raises:
            DataError: If they are missing, damaged or foreign.
        """
        path = PUBLISHED.find(self.weights, download=self.download)
        file = read_weights(path, PUBLISHED.what)
        with torch.device("meta"):
            network = InceptionNetwork()
        file.fill(network)
        details = {
            "name": "inception-v3-2015-12-05",
            "weights": file.sha256,
            "verified": file.is_published(PUBLISHED),
            "layer": "2048",
            "logits": "logits_unbiased",
        }
        return InceptionExtractor(network, self.resize, details)


class InceptionExtractor(FrozenNetwork[Features]):
    """Inception, ready to look at images: a ``FeatureExtractor``.

    Args:
        network: The network.
        resize: See ``InceptionV3``.
        details: What its numbers depend on besides.
    """

    num_features = 2048

    def __init__(
        self, network: "InceptionNetwork", resize: InceptionResize, details: Mapping[str, Any]
    ) -> None:
        super().__init__(network, {**details, "resize": resize, "input_size": INPUT_SIZE})
        self._resize = _RESIZES[resize]

    @override
    def look(self, pixels: Tensor) -> Features:
        """Resize, and run the network once."""
        return Features(*self.network(self._resize(pixels, INPUT_SIZE)))


class InceptionNetwork(nn.Module):
    """The layers of torch-fidelity's network under its names, which reads no weights itself."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in _layers().items():
            self.add_module(name, layer)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images in [0, 255], ``(B, 3, 299, 299)``, to features and unbiased class scores.

        Returns:
            ``(B, 2048)``, the mean over places of the last block, and ``(B, 1008)``.
        """
        states = (images - 128) / 128
        for name, layer in self.named_children():
            if name != "fc":
                states = layer(states)
        features = states.flatten(1)
        return features, features.mm(self.fc.weight.T)


def _layers() -> dict[str, nn.Module]:
    """Build all layers before the classifier, in order."""
    return {
        "Conv2d_1a_3x3": BasicConv2d(3, 32, kernel_size=3, stride=2),
        "Conv2d_2a_3x3": BasicConv2d(32, 32, kernel_size=3),
        "Conv2d_2b_3x3": BasicConv2d(32, 64, kernel_size=3, padding=1),
        "MaxPool_1": nn.MaxPool2d(kernel_size=3, stride=2),
        "Conv2d_3b_1x1": BasicConv2d(64, 80, kernel_size=1),
        "Conv2d_4a_3x3": BasicConv2d(80, 192, kernel_size=3),
        "MaxPool_2": nn.MaxPool2d(kernel_size=3, stride=2),
        "Mixed_5b": InceptionA(192, pool_features=32),
        "Mixed_5c": InceptionA(256, pool_features=64),
        "Mixed_5d": InceptionA(288, pool_features=64),
        "Mixed_6a": InceptionB(288),
        "Mixed_6b": InceptionC(768, channels_7x7=128),
        "Mixed_6c": InceptionC(768, channels_7x7=160),
        "Mixed_6d": InceptionC(768, channels_7x7=160),
        "Mixed_6e": InceptionC(768, channels_7x7=192),
        "Mixed_7a": InceptionD(768),
        "Mixed_7b": InceptionE_1(1280),
        "Mixed_7c": InceptionE_2(2048),
        "AvgPool": nn.AdaptiveAvgPool2d((1, 1)),
    }
