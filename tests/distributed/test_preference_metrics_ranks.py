"""Retrieval and pair accuracy of one, two and three ranks are the same to the last bit."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional as F

from segalign.metrics import host_gather
from segalign.metrics.pair_accuracy import PairAccuracy
from segalign.metrics.pair_buckets import BUCKETS
from segalign.metrics.retrieval import Retrieval

pytestmark = pytest.mark.distributed

NUM_SAMPLES, READINGS, WIDTH = 50, 3, 24
# Rows of each rank, uneven; sample 7 is served twice by one rank and once more by another, as a
# sampler pads, and the last of three ranks has nothing.
ROWS = {
    1: [range(NUM_SAMPLES)],
    2: [[7, 7, *range(30, 50)], [*range(29, -1, -1)]],
    3: [[7, *range(41)], [*range(49, 39, -1), 7], []],
}
# Pairs are told apart by `valid` alone.
PAIRS = {1: [range(50)], 2: [range(30, 50), range(30)], 3: [range(41), range(41, 50), []]}


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(NUM_SAMPLES, 1 + READINGS, WIDTH, generator=generator) + 0.3
    drawn[:, 1:] += 0.6 * drawn[:, :1]
    unit = F.normalize(drawn, dim=-1)
    return unit[:, 0], unit[:, 1:]


def rank_images(rows, group=None) -> list[torch.Tensor]:
    images, texts = features()
    metric = Retrieval(READINGS, gallery_size=20, process_group=group)
    for part in torch.tensor(list(rows), dtype=torch.int64).split(9):
        owner = part.clamp(max=NUM_SAMPLES - 6)  # the last ones have one caption, so one feature
        captions = [f"caption {number}" for number in owner.tolist()]
        metric.update(part, captions, images[part], texts[owner], torch.ones(len(part)) > 0)
    return list(metric.compute().values())


def count_pairs(rows, group=None) -> list[torch.Tensor]:
    metric = PairAccuracy(2, process_group=group)
    for start in range(0, len(rows), 4):
        part = [*rows[start : start + 4], 0]  # the last row is padding
        valid = torch.arange(len(part)) < len(part) - 1
        draws = [torch.Generator().manual_seed(number) for number in part]
        scores = torch.stack([torch.randint(3, (2, 2), generator=draw) for draw in draws]).float()
        probs = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5]])[torch.tensor(part) % 3]
        buckets = [(BUCKETS[0], BUCKETS[1 + number % 4]) for number in part]
        segments = [
            torch.rand(1 + number % 9, 2, generator=draw)
            for number, draw in zip(part, draws, strict=True)
        ]
        metric.update(scores, probs, valid, buckets, segments)
    return list(metric.compute().values())


def compute(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    host_gather._CHUNK_BYTES = 1000  # several chunks, the last of them not full
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3
    )
    groups = {3: distributed.group.WORLD, 2: distributed.new_group([0, 1])}
    for world_size, group in groups.items():
        if rank < world_size:
            found = rank_images(ROWS[world_size][rank], group)
            found += count_pairs(PAIRS[world_size][rank], group)
            torch.save(found, f"{folder}/{world_size}-{rank}.pt")
    distributed.destroy_process_group()


def test_any_number_of_ranks_counts_the_same(tmp_path: Path):
    expected = rank_images(ROWS[1][0]) + count_pairs(PAIRS[1][0])
    recall = expected[0][..., 0]
    assert (recall > 0.1).all()
    assert (recall < 0.9).all()
    multiprocessing.start_processes(compute, (str(tmp_path),), nprocs=3, start_method="fork")
    for name in ("2-0", "2-1", "3-0", "3-1", "3-2"):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert len(found) == len(expected) == 11
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
