"""A generator, a metric and a setting small enough to evaluate in a test."""

import random

import numpy as np
import torch

from segalign.evaluation.image_metric import (
    EvaluationSetting,
    Findings,
    ImageMetric,
    SourcePool,
)
from segalign.evaluation.plan import EvaluationPlan
from segalign.rng import counter_normal


def rows_of(count: int) -> list:
    return [
        {"sample_id": 10 + number, "caption": f"caption {number}", "metadata": {}}
        for number in range(count)
    ]


def setting_of(count: int = 5, images_per_caption: int = 1, batch_size: int = 4, **changes):
    settings = {
        "plan": EvaluationPlan(count, images_per_caption, batch_size),
        "rows": rows_of(count),
        "eval_seed": 3,
        "weights": "raw",
        "device": torch.device("cpu"),
        "pool": SourcePool(),
    }
    return EvaluationSetting(**{**settings, **changes})


class ToyGenerator:
    """Uniform noise from (seed, sample id); draws from every global generator besides."""

    def __init__(self, size: int = 6, bad_captions=(), offset: float = 0.0):
        self.size, self.bad_captions, self.offset = size, set(bad_captions), offset
        self.calls: list = []

    def generate(self, captions, sample_ids, eval_seed, weights="raw"):
        self.calls.append((list(captions), list(sample_ids), eval_seed, weights))
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        seeds = [eval_seed] * len(captions) if isinstance(eval_seed, int) else eval_seed
        counters = list(zip(seeds, sample_ids, strict=True))
        images = counter_normal("toy image", counters, (3, self.size, self.size)).sigmoid()
        for row, caption in enumerate(captions):
            if caption in self.bad_captions:
                images[row] = torch.nan
        return images + self.offset


class Recorder(ImageMetric):
    """Keeps all that it is shown."""

    name = "recorder"

    def __init__(self):
        self.batches = []

    def start(self, setting):
        self.setting, self.batches = setting, []

    def update(self, batch):
        self.batches.append(batch)

    def finish(self):
        counted = sum(int(batch.counted.sum()) for batch in self.batches)
        return Findings({"seen": float(counted)}, {"metric": "recorder"}, notes=["look at this"])
