"""Time the training step of a preference model by segments against the step by single texts.

Both steps are those of ``SegmentPreferenceModule``: both towers forward and backward, losses, and
AdamW, on the same random weights, images and captions; one takes the captions' 12 segments, the
other cuts captions at 77 tokens. They take turns in one process, on new captions each time; the
ratio of their best times is what matters. One JSON line per run is added to
``benchmarks/results/preference_step.jsonl``. The meta device computes nothing and counts FLOPs.

    python benchmarks/preference_step.py --size clip-l --batch-size 2 --repeats 2
    python benchmarks/preference_step.py --size vit-h-14 --device meta --batch-size 16
    python benchmarks/preference_step.py --size vit-h-14 --device cuda --batch-size 16
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_encoding import NUM_SEGMENTS, make_captions
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from lightning_modules.segment_preference import SegmentPreferenceModule
from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.losses.objective import PreferenceObjective
from segalign.rewards.scorer_source import PretrainedScorer
from segalign.rewards.trained_parts import TrainedParts
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import VOCAB_SIZE, clip_tokenizer
from segalign.types import PreferenceBatch

RESULTS = Path(__file__).parent / "results" / "preference_step.jsonl"
GOAL = 1.4
KINDS = ("segments", "single")
OBJECTIVE = PreferenceObjective(pairwise=1.0, segment_pairwise=1.0, segment_contrastive=1.0)
CONTRAST = PreferenceObjective(segment_contrastive=1.0)


@dataclass(frozen=True, kw_only=True)
class RandomScorer:
    """A scorer without trained weights, of a size of this benchmark."""

    size: str

    def load(self) -> ClipScorer:
        """Build it; ``clip-l`` is ViT-L/14 as OpenAI trained it."""
        if self.size != "clip-l":
            return PretrainedScorer(model=self.size, init="random").load()
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        tokens = {"bos_token_id": VOCAB_SIZE - 2, "eos_token_id": VOCAB_SIZE - 1}
        image = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        config = CLIPConfig(
            text_config={**text, **tokens, "num_hidden_layers": 12, "vocab_size": VOCAB_SIZE},
            vision_config={**image, "num_hidden_layers": 24, "image_size": 224, "patch_size": 14},
            projection_dim=768,
        )
        return ClipScorer(CLIPModel(config), clip_tokenizer(), ImageSettings(image_size=224))


@dataclass(frozen=True)
class Steps:
    """Both training steps of one model.

    Attributes:
        module: The module; its optimizer is below.
        optimizer: AdamW, as in ``configs/denscore.yaml``.
        device: Where they run; on a GPU in bfloat16, under autocast.
        images_each: Images of a caption: a pair, or one.
    """

    module: SegmentPreferenceModule
    optimizer: torch.optim.Optimizer
    device: torch.device
    images_each: int

    @classmethod
    def build(cls, options: argparse.Namespace) -> "Steps":
        """Build the model with random weights."""
        device = torch.device(options.device)
        make_optimizer = partial(torch.optim.AdamW, lr=3e-6)
        module = SegmentPreferenceModule(
            make_optimizer,
            scorer=RandomScorer(size=options.size),
            objective=OBJECTIVE if options.images == 2 else CONTRAST,
            trained=TrainedParts(gradient_checkpointing=options.checkpointing),
        )
        torch.manual_seed(0)
        with device:
            module.configure_model()
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        return cls(module, make_optimizer(module.parameters()), device, options.images)

    def choose(self, kind: str) -> None:
        """Score captions by segments, or cut."""
        self.module.scorer.segmenter = SentenceSegmenter() if kind == "segments" else None

    def run(self, kind: str, batch: PreferenceBatch) -> None:
        """Take one step."""
        self.choose(kind)
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast if self.device.type == "cuda" else contextlib.nullcontext():
            loss = self.module.training_step(batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def batch(self, size: int, seed: int) -> PreferenceBatch:
        """Draw images and captions of 12 segments."""
        seeds = range(seed * size, (seed + 1) * size)
        captions = [make_captions(one, one_long_segment=False)[1] for one in seeds]
        side = self.module.scorer.preprocessing.settings.image_size
        pixels = torch.rand(size, self.images_each, 3, side, side, device=self.device)
        batch: Any = {"captions": captions, "valid": torch.ones(size, device=self.device) > 0}
        if self.images_each == 1:
            return {**batch, "images": pixels.squeeze(1)}
        probs = torch.tensor([[1.0, 0.0]], device=self.device).expand(size, 2)
        return {**batch, "image_pairs": pixels, "preference_probs": probs}


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Return CPU seconds, or seconds of the clock on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def measure(steps: Steps, options: argparse.Namespace) -> dict[str, Any]:
    """Time the steps by turns; the first of each chooses kernels and makes room for AdamW."""
    on_gpu = steps.device.type == "cuda"
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    peaks = dict.fromkeys(KINDS, 0.0)
    for repeat in range(options.warmup + options.repeats):
        batch = steps.batch(options.batch_size, repeat)
        for kind in KINDS:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(steps.device)
            seconds = timed(partial(steps.run, kind, batch), steps.device)
            if on_gpu:
                peaks[kind] = torch.cuda.max_memory_allocated(steps.device) / 2**30
            if repeat >= options.warmup:
                times[kind].append(seconds)
    best = {kind: min(seconds) for kind, seconds in times.items()}
    found: dict[str, Any] = {
        "seconds": {kind: round(seconds, 4) for kind, seconds in best.items()},
        "seconds_median": {kind: round(statistics.median(t), 4) for kind, t in times.items()},
        "captions_per_second": {k: round(options.batch_size / s, 3) for k, s in best.items()},
        "ratio": round(best["segments"] / best["single"], 3),
    }
    return found | ({"peak_gib": {k: round(v, 2) for k, v in peaks.items()}} if on_gpu else {})


def count(steps: Steps, options: argparse.Namespace) -> dict[str, Any]:
    """Count the FLOPs of both towers, forward and backward."""
    batch: Any = steps.batch(options.batch_size, 0)
    scorer = steps.module.scorer
    images = batch["image_pairs"].flatten(0, 1) if steps.images_each == 2 else batch["images"]
    flops: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        steps.choose(kind)
        texts = [text for caption in batch["captions"] for text in scorer.split(caption)]
        flops[kind] = {
            "text": _flops(lambda texts=texts: scorer.text_features(texts)),
            "images": _flops(lambda: scorer.image_features(images)),
        }
    totals = {kind: sum(parts.values()) for kind, parts in flops.items()}
    gflops = {
        kind: {part: round(number / options.batch_size / 1e9, 3) for part, number in parts.items()}
        for kind, parts in flops.items()
    }
    return {
        "gflops_per_caption": gflops,
        "ratio": round(totals["segments"] / totals["single"], 3),
    }


def _flops(encode: Callable[[], Tensor]) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        encode().sum().backward()
    return float(counter.get_total_flops())


def write(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result and append one JSON line."""
    on_gpu = options.device.startswith("cuda")
    where = torch.cuda.get_device_name(options.device) if on_gpu else platform.machine()
    line = {
        "size": options.size,
        "device": "meta" if options.device == "meta" else where,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "captions": [options.batch_size, NUM_SEGMENTS],
        "images_per_caption": options.images,
        "checkpointing": options.checkpointing,
        "repeats": options.repeats,
        "goal": GOAL,
        **found,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    for name, values in found.items():
        print(f"{name:<22}{values}")
    unit = {"cpu": "CPU seconds of one thread", "meta": "FLOPs"}.get(options.device, "seconds")
    print(f"segments : single = {found['ratio']:.2f}x in {unit}; goal: at most {GOAL}x")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("tiny", "clip-l", "vit-h-14"), default="tiny")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or meta to count FLOPs")
    parser.add_argument("--batch-size", type=int, default=4, help="captions of a step")
    parser.add_argument("--images", type=int, choices=(1, 2), default=2, help="of each caption")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    steps = Steps.build(options)
    write(count(steps, options) if options.device == "meta" else measure(steps, options), options)


if __name__ == "__main__":
    main()
