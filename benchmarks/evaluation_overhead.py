"""What metrics add to the time of making the images, on scenes.

    python benchmarks/evaluation_overhead.py --out benchmarks/results/evaluation_overhead.md

The images are those of the quickstart's evaluation: two of each caption, 10 steps, guidance 2.
Goal: metrics take at most 5 % of the time that images take. Networks here are tiny, and so is the
generator: of Stable Diffusion at 50 steps (85 TFLOP an image), Inception's 0.011 TFLOP are 0.01 %.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from segalign.data.scene_shards import ScenesShards
from segalign.diffusion.generator import TextToImage, Weights
from segalign.diffusion.sampler import DDIMSampler
from segalign.evaluation.captions import read_caption_rows
from segalign.evaluation.evaluator import Evaluator, Outcome
from segalign.evaluation.image_metric import EvaluationSetting, ImageMetric, SourcePool
from segalign.evaluation.plan import EvaluationPlan
from segalign.metrics.distribution_metrics import FrechetImageMetric, KernelImageMetric
from segalign.metrics.diversity import Diversity
from segalign.metrics.drift import Drift
from segalign.metrics.extractors.tiny import TinyExtractor
from segalign.metrics.image_statistics import ImageStatistics
from segalign.metrics.perceptual.tiny import TinyPerceptual
from segalign.metrics.reference import ReferenceImages
from segalign.scenes.base import ScenesBase
from segalign.scenes.image_metric import SceneFacts
from segalign.scenes.world import get_world
from segalign.text.settings import TextEncoding

GOAL = 0.05


class Scenes:
    """The shipped model of scenes as an image generator."""

    def __init__(self) -> None:
        bundle = ScenesBase().load()
        bundle.unet.eval()
        text = TextEncoding(token_budget=512, mask_padding=True)
        self.model = TextToImage(
            bundle.unet,
            text.build(bundle.text_models),
            bundle.codec,
            bundle.schedule,
            image_size=bundle.image_size,
            mask_padding=True,
        )
        self.sampler = DDIMSampler(num_inference_steps=10, guidance_scale=2.0)

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make images; see ``ImageGenerator``."""
        noise = self.model.noise(sample_ids, eval_seed)
        return self.model.sample(captions, noise, self.sampler)


def all_metrics(shards: Path) -> dict[str, list[ImageMetric]]:
    """List metrics by what they are called in the table; those of one row share what they see."""
    extractor, network = TinyExtractor(), TinyPerceptual()
    real = ReferenceImages(str(shards))
    return {
        "FID": [FrechetImageMetric("fid", extractor, real)],
        "KID": [KernelImageMetric("kid", extractor, real)],
        "LPIPS-like diversity and drift": [Diversity(network), Drift(network)],
        "facts by the oracle": [SceneFacts(get_world("3x3"))],
        "statistics of images": [ImageStatistics()],
    }


def measure(setting: EvaluationSetting, metrics: list[ImageMetric], scenes: Scenes) -> Outcome:
    """Evaluate once."""
    return Evaluator(setting, metrics).run(scenes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        made = ScenesShards(num_train=1, num_val=256, root=folder)
        made.prepare()
        shards, scenes = made.folder("val"), Scenes()
        rows = read_caption_rows(shards, options.captions)
        setting = EvaluationSetting(
            plan=EvaluationPlan(len(rows), 2, 32),
            rows=rows,
            eval_seed=1234,
            weights="raw",
            device=torch.device("cpu"),
            pool=SourcePool(),
            is_final=False,
        )
        kinds = all_metrics(shards)
        together = [metric for metrics in kinds.values() for metric in metrics]
        measure(setting, together, scenes)  # warms up, and computes the reference statistics
        found = {name: measure(setting, metrics, scenes) for name, metrics in kinds.items()}
        found["all together"] = measure(setting, together, scenes)
    text = report(found, options)
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def report(found: dict[str, Outcome], options: argparse.Namespace) -> str:
    """Write the table."""
    version = torch.__version__.partition("+")[0]
    lines = [
        "# What metrics cost",
        "",
        (
            f"{2 * options.captions} images of scenes, 36 px, 10 steps with guidance, on a CPU "
            f"with {options.threads} thread(s), torch {version}; shares "
            "of the time that making the images takes."
        ),
        "",
        "| metrics | making images | metrics | share |",
        "|---|---|---|---|",
    ]
    for name, outcome in found.items():
        share = outcome.metric_seconds / outcome.making_seconds
        seconds = f"{outcome.making_seconds:.2f} s | {outcome.metric_seconds:.3f} s"
        lines.append(f"| {name} | {seconds} | {share:.1%} |")
    total = found["all together"]
    is_met = total.metric_seconds <= GOAL * total.making_seconds
    lines += ["", f"Goal: all together at most {GOAL:.0%}: {'met' if is_met else 'not met'}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
