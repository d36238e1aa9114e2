"""The common direction of two ranks is that of their joined batch."""

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from segalign.rewards.common_direction import BatchDirection, EmaDirection


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(80, 12, generator=generator, dtype=torch.float64) + 1
    return drawn / drawn.norm(dim=1, keepdim=True)


def estimate(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    # Uneven shares: 70 of one rank, 10 of the other.
    own = features().split([70, 10])[rank]
    # One caption of each rank is a batch of two.
    BatchDirection(refuse_single=True)(own[:1])
    found = torch.stack([BatchDirection()(own), EmaDirection()(own), EmaDirection().observe(own)])
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_estimate_the_direction_of_the_joined_batch(tmp_path: Path):
    multiprocessing.start_processes(estimate, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = torch.nn.functional.normalize(features().mean(dim=0), dim=0)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (found - expected).abs().max() < 1e-12
