"""Alignment, retrieval and scene facts of one, two and three ranks are the same to the last bit."""

import functools
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from toy_alignment import alignment_rows, batches_of, brightness, toy_clip_reward
from toy_evaluation import setting_of

from segalign.evaluation.kept_images import KeptImages
from segalign.metrics import host_gather
from segalign.metrics.alignment import Alignment
from segalign.metrics.generated_retrieval import GeneratedRetrieval
from segalign.scenes.image_metric import SceneFacts
from segalign.scenes.samples import make_sample
from segalign.scenes.world import get_world

pytestmark = pytest.mark.distributed

# Ten captions of two images in two micro-batches of twelve, so that the last of three ranks has
# nothing but padding; and places that do not count.
COUNT, LOST = 10, {1, 4, 5, 16, 17, 18}
SCENES = [make_sample("2x2", 5, number, length="long") for number in range(COUNT)]


def setting():
    rows = [
        {**row, "metadata": SCENES[number].metadata} | {"caption": caption}
        for number, row in enumerate(alignment_rows(COUNT))
        for caption in [SCENES[number].caption]
    ]
    return setting_of(COUNT, 2, 12, rows=rows)


def pixels(place):
    image = torch.tensor(SCENES[place * 7 // 13 % COUNT].image).permute(2, 0, 1)
    return (image.int() * (20 - place) // 20).byte()


@functools.cache
def reward():
    """Made before processes are forked, which then share it."""
    return toy_clip_reward()


def findings(rank: int, world_size: int) -> list:
    evaluation, kept = setting(), KeptImages(3, 2)
    metrics = [
        Alignment({"dense": reward(), "bright": brightness}),
        GeneratedRetrieval(reward(), gallery_size=4),
        SceneFacts(get_world("2x2")),
        kept,
    ]
    for metric in metrics:
        metric.start(evaluation)
    for batch in batches_of(evaluation, rank, world_size, LOST, pixels):
        for metric in metrics:
            metric.update(batch)
    found = [metric.finish() for metric in metrics]
    parts = [[dict(one.values), one.protocol, one.per_image, list(one.notes)] for one in found]
    return [parts, {place: image.tolist() for place, image in kept.images.items()}]


def compute(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    host_gather._CHUNK_BYTES = 200  # several chunks, the last of them not full
    store = f"file://{folder}/store-{world_size}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.save(findings(rank, world_size), f"{folder}/{world_size}-{rank}.pt")
    distributed.destroy_process_group()


def test_any_number_of_ranks_finds_the_same(tmp_path: Path):
    expected = findings(0, 1)
    values = {name: one for part in expected[0] for name, one in part[0].items()}
    assert {"denscore_o/dense", "segment_offset/dense/from_8", "retrieval/r_at_1", "attributes",
            "chance/attributes", "reward/bright/length/78-154"} <= {*values}  # fmt: skip
    assert [*expected[1]] == [0, 2, 3]
    for world_size in (2, 3):
        multiprocessing.start_processes(
            compute, (world_size, str(tmp_path)), nprocs=world_size, start_method="fork"
        )
        for rank in range(world_size):
            found = torch.load(tmp_path / f"{world_size}-{rank}.pt", weights_only=True)
            # Both are plain data without NaN, so that equal means equal bits.
            assert found == expected, (world_size, rank)
