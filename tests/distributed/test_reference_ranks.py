"""Reference statistics are the same bits for any number of ranks, and rank 0 alone writes them."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from toy_evaluation import setting_of
from toy_extractor import ToyExtractor

from segalign.data.packing import pack
from segalign.data.scene_shards import SceneSource
from segalign.errors import DataError
from segalign.metrics.extractors.tiny import TinyExtractor
from segalign.metrics.reference import ReferenceImages

pytestmark = pytest.mark.distributed
COUNT = 13  # in micro-batches of 4: the third of three ranks has a full one, and then an empty one


def compute(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size
    )
    found = []
    cache = Path(folder) / f"cache{world_size}"
    reference = ReferenceImages(f"{folder}/shards", batch_size=4, cache=str(cache))
    for _ in range(2):
        statistics = reference.statistics(TinyExtractor().load(), setting_of())
        sums = statistics.statistics
        tensors = [sums.feature_sum, sums.product_sum, statistics.rows]
        found.append([*tensors, torch.tensor(sums.num_samples)])
        text = repr(statistics.protocol).encode()
        found[-1].append(torch.tensor(list(hashlib.sha256(text).digest())))
    torch.save(found, f"{folder}/{world_size}-{rank}.pt")
    distributed.destroy_process_group()


def test_any_number_of_ranks_computes_the_same_once(tmp_path: Path):
    pack(SceneSource("2x2", COUNT), tmp_path / "shards")
    (tmp_path / "shards" / "statistics").touch()
    results = []
    for world_size in (1, 2, 3):
        arguments = (world_size, str(tmp_path))
        multiprocessing.start_processes(compute, arguments, nprocs=world_size, start_method="fork")
        (path,) = (tmp_path / f"cache{world_size}").iterdir()
        results.append(path.read_bytes())
        for rank in range(world_size):
            found = torch.load(tmp_path / f"{world_size}-{rank}.pt", weights_only=True)
            expected = torch.load(tmp_path / "1-0.pt", weights_only=True)[0]
            assert int(expected[3]) == len(expected[2]) == COUNT
            for one in found:
                assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))
    assert results[0] == results[1] == results[2]


def fail(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    extractor = ToyExtractor(fails_above=2.0 if rank == 0 else 0.0)
    with pytest.raises(DataError, match="expected finite features"):
        ReferenceImages(f"{folder}/shards", batch_size=4).statistics(extractor, setting_of())
    Path(folder, f"refused-{rank}").touch()
    distributed.destroy_process_group()


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path):
    pack(SceneSource("2x2", COUNT), tmp_path / "shards")
    multiprocessing.start_processes(fail, (str(tmp_path),), nprocs=2, start_method="fork")
    assert {path.name for path in tmp_path.glob("refused-*")} == {"refused-0", "refused-1"}
    assert not list((tmp_path / "shards" / "statistics").iterdir())
