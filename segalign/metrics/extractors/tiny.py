"""A tiny network of seeded weights in place of Inception: for tests and the embedded benchmark.

Dims: B images, H/W pixels.
"""

from collections import OrderedDict
from typing import Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from segalign.metrics.extractors.frozen import FrozenNetwork
from segalign.metrics.extractors.protocol import Features
from segalign.metrics.extractors.weight_files import digest_tensors
from segalign.rng import counter_seed

_WIDTH: Final = 32
_LOGIT_GAIN: Final = 16.0


class TinyExtractor:
    """A small convolutional network that has learned nothing; its FID is for itself alone.

    Args:
        seed: Seed of its weights; global random numbers do not matter, and are not drawn.
        num_features: Length of the features.
        num_classes: Class scores for IS.
    """

    def __init__(self, seed: int = 0, num_features: int = 64, num_classes: int = 10) -> None:
        self.seed = seed
        self.num_features = num_features
        self.num_classes = num_classes

    def load(self) -> "TinyFeatures":
        """Draw the weights."""
        with torch.device("meta"):
            stages = tiny_stages(_WIDTH, _WIDTH, self.num_features)
            network = nn.ModuleDict(
                {"stages": stages, "classifier": nn.Linear(self.num_features, self.num_classes)}
            )
        draw_he(network, "tiny extractor", self.seed)
        return TinyFeatures(network)


class TinyFeatures(FrozenNetwork[Features]):
    """A drawn ``TinyExtractor``: a ``FeatureExtractor``.

    Args:
        network: ``stages`` of a convolution and a ReLU each, and ``classifier``.
    """

    def __init__(self, network: nn.ModuleDict) -> None:
        self._stages, self._classifier = network["stages"], network["classifier"]
        self.num_features: int = self._classifier.in_features  # type: ignore[assignment]
        details = {
            "name": "tiny random network (no FID of others compares)",
            "weights": digest_tensors(network.state_dict()),
            "layer": "mean over places",
            "resize": "none",
            "input_size": None,
        }
        super().__init__(network, details)

    @override
    def look(self, pixels: Tensor) -> Features:
        """Average the last stage over places."""
        features = self._stages(tiny_input(pixels)).mean(dim=(2, 3))
        return Features(features, _LOGIT_GAIN * self._classifier(features))


def tiny_stages(*widths: int) -> nn.Sequential:
    """Build stages that halve an image of any size: a convolution and a ReLU each."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (width, out_width) in enumerate(zip((3, *widths), widths, strict=False)):
        convolution = nn.Conv2d(width, out_width, kernel_size=3, stride=2, padding=1)
        stages[str(number)] = nn.Sequential(convolution, nn.ReLU())
    return nn.Sequential(stages)


def tiny_input(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to float32 in [-2, 2)."""
    return (pixels.float() - 128) / 64


def draw_he(network: nn.Module, purpose: str, seed: int) -> None:
    """Replace all weights of a network by normal ones of variance 2 / inputs, biases by zero.

    Args:
        network: The network, perhaps of shape alone.
        purpose: Name of the draw.
        seed: Seed; with the number of the tensor it decides each draw, and nothing else does.
    """
    with torch.inference_mode(False), torch.no_grad():
        drawn = {}
        for number, (name, weight) in enumerate(network.state_dict().items()):
            generator = torch.Generator().manual_seed(counter_seed(purpose, seed, number))
            normal = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            deviation = (2 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 0.0
            drawn[name] = normal * deviation
        network.load_state_dict(drawn, assign=True)
