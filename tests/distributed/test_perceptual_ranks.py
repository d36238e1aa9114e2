"""Diversity and drift of one, two and three ranks are the same to the last bit."""

import json
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from toy_evaluation import setting_of
from toy_weights import pixels_of

from segalign.evaluation.image_metric import ImageBatch
from segalign.metrics.diversity import Diversity
from segalign.metrics.drift import Drift
from segalign.metrics.perceptual.tiny import TinyPerceptual

pytestmark = pytest.mark.distributed

# Three micro-batches of six, the last not full; of three ranks each has one, of four one has none.
NUM, EACH, SIZE = 5, 3, 6


def measure(rank: int, world_size: int, lost: int | None = None) -> str:
    setting = setting_of(NUM, EACH, SIZE)
    pixels, start = (pixels_of(NUM * EACH, 36, 36, seed=seed) for seed in (1, 2))
    counted = torch.arange(NUM * EACH) != 7
    metrics = [Diversity(TinyPerceptual()), Drift(TinyPerceptual())]
    for metric in metrics:
        metric.start(setting)
    for planned in setting.plan.batches(rank, world_size):
        if lost is not None and (planned.index == lost or not any(planned.counted)):
            continue
        places = torch.tensor(planned.places)
        batch = ImageBatch(
            places=places,
            counted=torch.tensor(planned.counted) & counted[places],
            rows=[{}] * SIZE,
            pixels=pixels[places],
            start_pixels=start[places],
        )
        for metric in metrics:
            metric.update(batch)
    return json.dumps([vars(metric.finish()) for metric in metrics])


def compute(rank: int, folder: str, world_size: int, lost: int | None = None) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world_size}", rank=rank, world_size=world_size
    )
    Path(f"{folder}/{world_size}-{rank}.json").write_text(measure(rank, world_size, lost))
    distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_finds_the_same(tmp_path: Path, world_size: int):
    expected = measure(0, 1)
    diversity, drift = json.loads(expected)
    assert set(diversity["values"]) | set(drift["values"]) == {
        "lpips_diversity",
        "lpips_drift",
        "lpips_drift_ratio",
    }
    assert diversity["per_image"]["lpips_diversity"].count(None) == 1
    multiprocessing.start_processes(
        compute, (str(tmp_path), world_size), nprocs=world_size, start_method="fork"
    )
    for rank in range(world_size):
        assert (tmp_path / f"{world_size}-{rank}.json").read_text() == expected


def test_a_rank_may_have_made_nothing(tmp_path: Path):
    expected = measure(0, 1, lost=1)
    found = json.loads(expected)[1]["per_image"]["lpips_drift"]
    assert len(found) - found.count(None) == 9
    multiprocessing.start_processes(compute, (str(tmp_path), 2, 1), nprocs=2, start_method="fork")
    for rank in range(2):
        assert (tmp_path / f"2-{rank}.json").read_text() == expected
