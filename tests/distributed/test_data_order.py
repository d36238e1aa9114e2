"""Two gloo ranks are given the same global sequence as one, each sample once."""

import json
import os
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from segalign.data.ledger import Ledger, gather_stages
from segalign.data.loaders import BatchSettings, eval_loader, train_loader
from segalign.data.manifest import load_manifest, write_manifest
from segalign.data.order import BatchPlan
from segalign.data.tarfiles import ShardWriter

SIZES = [7, 2, 4]
NUM_STEPS = 8


def write_shards(folder: Path) -> None:
    indices, count = [], 0
    for number, size in enumerate(SIZES):
        name = f"s-{number}.tar"
        with (folder / name).open("wb") as file:
            writer = ShardWriter(file, name)
            for _ in range(size):
                writer.write(str(count), [("txt", f"caption {count}".encode())])
                count += 1
            indices.append(writer.finish())
    write_manifest(folder, indices)


def read(folder: Path, *, rank: int, world_size: int, num_workers: int) -> dict:
    """Return the ids of all training steps and of validation, and the ledger."""
    manifest = load_manifest(folder)
    plan = BatchPlan(global_batch_size=4, world_size=world_size, global_rank=rank)
    settings = BatchSettings(content="caption", num_workers=num_workers)
    ledger = Ledger(manifest.num_samples)
    steps = []
    for batch in islice(train_loader(manifest, plan, settings, seed=3), NUM_STEPS):
        ids = batch["sample_ids"].tolist()
        ledger.consume(ids, batch["epochs"].tolist(), batch["valid"].tolist(), batch["faults"])
        steps.append(ids)
    batches = list(eval_loader(manifest, plan, settings))
    val = [i for batch in batches for i in batch["sample_ids"][batch["valid"]].tolist()]
    return {"steps": steps, "val": val, "num_val_batches": len(batches), "ledger": ledger}


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = read(folder, rank=rank, world_size=2, num_workers=2)
    ledger = gather_stages({"train": found.pop("ledger")})["train"]
    ledger.check_identity()
    found["report"] = ledger.report()
    gathered = [None, None]
    dist.all_gather_object(gathered, found)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(gathered))
    dist.destroy_process_group()


def start_rank(rank: int, folder: Path, repository: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, str(rank), str(folder)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(repository)})


@pytest.mark.distributed
def test_two_ranks_and_two_workers_read_what_one_reads(tmp_path, repository):
    write_shards(tmp_path)
    ranks = [start_rank(rank, tmp_path, repository) for rank in range(2)]
    alone = read(tmp_path, rank=0, world_size=1, num_workers=0)
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    first, second = json.loads((tmp_path / "found.json").read_text())

    both = [a + b for a, b in zip(first["steps"], second["steps"], strict=True)]
    assert both == alone["steps"]
    flat = list(chain(*both))
    assert sorted(flat[:13]) == sorted(flat[13:26]) == list(range(13))
    assert flat[:13] != flat[13:26]

    assert first["num_val_batches"] == second["num_val_batches"] == 4
    assert sorted(first["val"] + second["val"]) == alone["val"] == list(range(13))

    assert first["report"] == json.loads(json.dumps(alone["ledger"].report()))


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
