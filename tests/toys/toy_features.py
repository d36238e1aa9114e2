"""Features, logits and an extractor small enough for tests of image metrics."""

import torch

from segalign.metrics.extractors.protocol import Features


def toy_features(count: int, width: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Draw float32 features, correlated in the same way whatever the seed, not on a grid."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ mix + 0.4 + shift


def on_grid(features: torch.Tensor, bits: int = 12) -> torch.Tensor:
    """Round features to the grid, so that rounding again changes nothing."""
    return (features.double() * 2**bits).round() / 2**bits


def toy_logits(count: int, classes: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    """Draw class scores."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, classes, generator=generator)


class ToyExtractor:
    """Takes the mean colour of ``width`` stripes; knows how often it was asked."""

    def __init__(self, width: int = 4, classes: int | None = 5, name: str = "toy"):
        self.num_features, self.classes, self.name = width, classes, name
        self.calls = 0

    def protocol(self):
        return {"name": self.name, "weights": "0" * 64, "layer": "stripes", "resize": "none"}

    def __call__(self, pixels):
        self.calls += 1
        stripes = pixels.float().mean(dim=1).flatten(1).unfold(1, 3, 2)[:, : self.num_features]
        features = stripes.mean(dim=-1) / 32
        logits = features[:, :1] * torch.arange(self.classes) if self.classes else None
        return Features(features, logits)

    def to(self, device):
        return self


class ToySource:
    """Loads the extractor it was given."""

    def __init__(self, extractor: ToyExtractor):
        self.extractor = extractor

    def load(self):
        return self.extractor
