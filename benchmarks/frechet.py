"""Time the Frechet distance of features of Inception's width against the two usual ways.

All three run in this process on the same covariances, on the same threads, one after the other in
every round; ratios of best times are what matters. ``scipy.linalg.sqrtm`` is what the first FID
code and its heirs call; scipy is no dependency but in the group ``benchmarks``, and its row is left
out where it is missing. ``torchmetrics`` computes eigenvalues of a matrix that is not symmetric, as
torch-fidelity does. The table goes to ``benchmarks/results/frechet.md``::

    uv run --group benchmarks python benchmarks/frechet.py --rounds 3
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from segalign.metrics.feature_statistics import FeatureStatistics
from segalign.metrics.frechet import frechet_distance

RESULTS = Path(__file__).parent / "results" / "frechet.md"
TOLERANCE = 1e-6
SEEDS = {"real": 0, "generated": 1}
OURS = "ours: Cholesky, symmetric eigenvalues"
GOALS = {"scipy `sqrtm`": 3.0, "torchmetrics `eigvals`": 4.0}
Gaussians = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Way:
    """One way to compute the distance.

    Attributes:
        run: The function.
        seconds: Of each round.
        distance: What it found.
    """

    run: Callable[[Gaussians], float]
    seconds: list[float] = field(default_factory=list)
    distance: float = 0.0

    def time(self, gaussians: Gaussians) -> None:
        """Run it once more."""
        start = time.perf_counter()
        self.distance = self.run(gaussians)
        self.seconds.append(time.perf_counter() - start)


def draw_features(side: str, count: int, width: int) -> Tensor:
    """Draw features like Inception's: not negative, correlated, of falling variance."""
    generator = torch.Generator().manual_seed(7)
    spectrum = torch.arange(1, width + 1) ** -0.5
    mix = torch.randn(width, width, generator=generator) * spectrum[:, None] / spectrum.norm()
    drawn = torch.Generator().manual_seed(SEEDS[side])
    latent = torch.randn(count, width, generator=drawn) @ mix
    return torch.relu(0.5 * latent + 0.3 + 0.02 * SEEDS[side])


def by_sqrtm(sqrtm: Callable[[Any], Any]) -> Callable[[Gaussians], float]:
    """Make the distance by a matrix square root of S1 S2."""

    def distance(gaussians: Gaussians) -> float:
        mean1, cov1, mean2, cov2 = (part.numpy() for part in gaussians)
        gap = mean1 - mean2
        root = sqrtm(cov1 @ cov2)
        return float(gap @ gap + cov1.trace() + cov2.trace() - 2 * root.real.trace())

    return distance


def make_ways() -> dict[str, Way]:
    """List the ways that can run here."""
    ways = {
        OURS: Way(lambda parts: float(frechet_distance(*parts))),
        "torchmetrics `eigvals`": Way(lambda parts: float(_compute_fid(*parts))),
    }
    try:
        from scipy.linalg import sqrtm  # noqa: PLC0415
    except ImportError:
        print("scipy is not installed: its row is left out")
        return ways
    return {OURS: ways.pop(OURS), "scipy `sqrtm`": Way(by_sqrtm(sqrtm)), **ways}


def float64_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance without the grid."""
    return features.double().mean(dim=0), torch.cov(features.double().T)


def table(ways: dict[str, Way], note: str) -> str:
    """Write the result as Markdown."""
    ours = ways[OURS]
    lines = [
        "| way | seconds, best | ratio to ours | goal | relative difference |",
        "|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        ratio = min(way.seconds) / min(ours.seconds)
        difference = abs(way.distance - ours.distance) / abs(ours.distance)
        cells = ["1", "", ""]
        if way is not ours:
            cells = [f"{ratio:.2f}", f">= {GOALS[name]:.0f}", f"{difference:.1e}"]
        lines.append(f"| {name} | {min(way.seconds):.2f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Measure, check that all agree, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--remark", default="", help="What else the machine was doing.")
    options = parser.parse_args()
    size = options.num_images, options.width
    features = {side: draw_features(side, *size) for side in SEEDS}
    fits = [FeatureStatistics.of(features[side]) for side in SEEDS]
    gaussians = tuple(part for fit in fits for part in (fit.mean(), fit.covariance()))
    ways = make_ways()
    for _ in range(options.rounds):
        for name, way in ways.items():
            way.time(gaussians)
            print(f"{name}: {way.seconds[-1]:.2f} s, {way.distance:.10g}", flush=True)
    ours = ways[OURS].distance
    exact = [part for side in SEEDS for part in float64_statistics(features[side])]
    shift = ours - float(frechet_distance(*exact))
    note = (
        f"`python benchmarks/frechet.py --rounds {options.rounds}`: d = {size[1]}, N = {size[0]} "
        f"on each side, float64, {torch.get_num_threads()} threads of {platform.machine()}, torch "
        f"{torch.__version__}; distance {ours:.6f}. Rounding features to multiples of 2^-12 "
        f"moves it by {shift:.1e}. {options.remark}"
    )
    text = table(ways, note.strip())
    print(text)
    for way in ways.values():
        assert abs(way.distance - ours) <= TOLERANCE * abs(ours)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
