import pickle
from itertools import islice

import pytest
import webdataset

from segalign.data.loaders import BatchLoader, BatchSettings
from segalign.data.manifest import index_shards, load_manifest
from segalign.data.order import BatchPlan, EpochOrder
from segalign.data.reader import IndexedShardReader, batch_pipeline
from segalign.data.transforms import CollateRows, DecodeRow


def make_loader(
    manifest, plan, *, num_workers=0, start=0, seed=0, hw=(4, 4), **finite
) -> BatchLoader:
    order = EpochOrder(manifest.shard_sizes, seed=seed, shuffle_window=2)
    reader = IndexedShardReader(manifest, order, plan, start=start, **finite)
    pipeline = batch_pipeline(
        reader, DecodeRow("image"), CollateRows("image", image_hw=hw), plan.batch_size
    )
    return BatchLoader(pipeline, BatchSettings(content="image", num_workers=num_workers))


def ids_of(loader, num_batches: int) -> list[list[int]]:
    return [batch["sample_ids"].tolist() for batch in islice(loader, num_batches)]


def test_raw_samples_are_what_webdataset_reads(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [3, 4])
    urls = [str(tmp_path / entry.name) for entry in manifest.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    reader = IndexedShardReader(manifest, EpochOrder([3, 4]), BatchPlan(global_batch_size=1))
    ours = [reader.read_sample(sample_id) for sample_id in range(7)]
    assert len(theirs) == 7
    for their, our in zip(theirs, ours, strict=True):
        assert {name: our[name] for name in ("__key__", "png", "json")} == {
            name: their[name] for name in ("__key__", "png", "json")
        }


def test_shards_of_shard_writer_are_read(tmp_path, plain_image):
    with webdataset.ShardWriter(str(tmp_path / "x-%d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": str(number), "png": plain_image(), "txt": f"c {number}"})
    manifest = index_shards(tmp_path)
    plan = BatchPlan(global_batch_size=5)
    loader = make_loader(manifest, plan, hw=(8, 8), num_micro_batches=1, num_positions=5)
    (batch,) = list(loader)
    assert sorted(batch["captions"]) == [f"c {number}" for number in range(5)]
    assert batch["valid"].all()


def test_workers_do_not_change_the_order(tmp_path, write_shards):
    write_shards(tmp_path, [5, 3, 4])
    plan = BatchPlan(global_batch_size=5)
    straight, one, two = (
        ids_of(make_loader(load_manifest(tmp_path), plan, num_workers=number), 9)
        for number in (0, 1, 2)
    )
    assert straight == one == two


def test_a_batch_may_straddle_an_epoch_border(tmp_path, write_shards):
    loader = make_loader(write_shards(tmp_path, [5, 3]), BatchPlan(global_batch_size=6))
    batches = list(islice(loader, 4))
    assert batches[1]["epochs"].tolist() == [0, 0, 1, 1, 1, 1]
    ids = [sample_id for batch in batches for sample_id in batch["sample_ids"].tolist()]
    assert sorted(ids) == sorted(list(range(8)) * 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_the_straight_run(tmp_path, write_shards, num_workers):
    manifest = write_shards(tmp_path, [5, 3, 4])
    plan = BatchPlan(global_batch_size=4, accumulate=2)
    straight = ids_of(make_loader(manifest, plan), 20)
    resumed = ids_of(make_loader(manifest, plan, start=7, num_workers=num_workers), 13)
    assert resumed == straight[7:]


def test_iterating_again_starts_where_it_is_told(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [5, 3])
    order = EpochOrder(manifest.shard_sizes)
    plan = BatchPlan(global_batch_size=2)
    reader = IndexedShardReader(manifest, order, plan)
    pipeline = batch_pipeline(reader, DecodeRow("image"), CollateRows("image"), 2)
    starts = iter([0, 3])
    settings = BatchSettings(content="image", num_workers=1)
    loader = BatchLoader(pipeline, settings, seek=lambda: reader.seek(next(starts)))
    straight = ids_of(loader, 5)
    assert ids_of(loader, 2) == straight[3:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_three_shards_on_two_ranks_deliver_each_sample_once(tmp_path, write_shards, num_workers):
    manifest = write_shards(tmp_path, [7, 2, 4])
    seen = []
    for rank in range(2):
        plan = BatchPlan(global_batch_size=4, world_size=2, global_rank=rank)
        loader = make_loader(
            manifest, plan, num_workers=num_workers, num_micro_batches=4, num_positions=13
        )
        batches = list(loader)
        assert len(batches) == 4
        for batch in batches:
            seen += batch["sample_ids"][batch["valid"]].tolist()
    assert sorted(seen) == list(range(13))


def test_padding_is_invalid_and_no_fault(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [1])
    plan = BatchPlan(global_batch_size=2, world_size=2, global_rank=1)
    (batch,) = list(make_loader(manifest, plan, num_micro_batches=1, num_positions=1))
    assert batch["valid"].tolist() == [False]
    assert batch["sample_ids"].tolist() == [-1]
    assert batch["captions"] == [""]
    assert batch["images"].abs().sum() == 0
    assert batch["faults"] == []


def damage(path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0xFF
    path.write_bytes(raw)


def test_a_damaged_sample_keeps_its_slot(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [4])
    plan = BatchPlan(global_batch_size=4)
    before = ids_of(make_loader(manifest, plan), 1)
    offset = manifest.samples(0)[2].members[0].offset
    damage(tmp_path / "shard-000000.tar", offset + 10)
    (batch,) = list(islice(make_loader(load_manifest(tmp_path), plan), 1))
    row = batch["sample_ids"].tolist().index(2)
    assert [batch["sample_ids"].tolist()] == before
    assert batch["valid"].tolist() == [place != row for place in range(4)]
    assert batch["captions"][row] == ""
    assert batch["images"][row].abs().sum() == 0
    (fault,) = batch["faults"]
    assert fault.pop("detail").startswith("the bytes at ")
    assert fault == {
        "shard": "shard-000000.tar",
        "key": "000002",
        "offset": offset,
        "reason": "checksum",
        "row": row,
        "epoch": 0,
        "position": row,
    }


def test_a_shard_that_vanishes_is_a_read_error(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [2])
    (tmp_path / "shard-000000.tar").unlink()
    (batch,) = list(islice(make_loader(manifest, BatchPlan(global_batch_size=2)), 1))
    assert [fault["reason"] for fault in batch["faults"]] == ["read_error", "read_error"]


def test_a_shard_that_is_cut_off_is_a_read_error(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [2])
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:600])
    raw = IndexedShardReader(manifest, EpochOrder([2]), BatchPlan(global_batch_size=1)).read_sample(
        0
    )
    assert raw["__fault__"].reason == "read_error"


def test_reader_survives_pickling_with_open_files(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [2])
    reader = IndexedShardReader(manifest, EpochOrder([2]), BatchPlan(global_batch_size=1))
    first = reader.read_sample(0)
    assert pickle.loads(pickle.dumps(reader)).read_sample(0) == first
