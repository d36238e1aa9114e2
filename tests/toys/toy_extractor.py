"""A feature extractor that counts its calls, of features that a test can compute itself."""

from typing import Any

import torch

from segalign.metrics.extractors.protocol import Features


class ToyExtractor:
    """Mean and mean square of each channel, in [0, 1]; the source of itself."""

    num_features = 6

    def __init__(self, weights: str = "toy", fails_above: float = 2.0):
        self.weights, self.fails_above = weights, fails_above
        self.shapes: list[tuple[int, ...]] = []

    def load(self):
        return self

    def to(self, device):
        return self

    def protocol(self):
        return {"name": "Toy (for tests)", "weights": self.weights, "resize": "none"}

    def __call__(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        assert pixels.dtype == torch.uint8
        values = pixels.float() / 255
        features = torch.cat([values.mean((2, 3)), values.square().mean((2, 3))], dim=1)
        features[values.amax((1, 2, 3)) > self.fails_above] = torch.nan
        return Features(features, None)


class HoldsAnything:
    """Settings of an extractor that take whatever a config says."""

    def __init__(self, part: Any = None):
        self.part = part

    def load(self) -> Any:
        return ToyExtractor()
