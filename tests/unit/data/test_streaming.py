import io
import logging
import re
import tarfile
from itertools import islice

import pytest
import webdataset

from segalign.data.loaders import BatchSettings, stream_loader
from segalign.data.order import BatchPlan
from segalign.data.streaming import stream_urls
from segalign.error_boundary import original_message
from segalign.errors import ConfigError, DataError


@pytest.fixture
def foreign(tmp_path):
    pattern = str(tmp_path / "s-%d.tar")
    with webdataset.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
        for number in range(50):
            writer.write({"__key__": f"{number:03d}", "txt": f"c {number}"})
    return tmp_path


def batches(folder, num_batches, *, rank=0, world_size=1, num_workers=0, seed=0):
    plan = BatchPlan(global_batch_size=5 * world_size, world_size=world_size, global_rank=rank)
    loader = stream_loader(
        stream_urls(str(folder), allow_pipe=False),
        plan,
        BatchSettings(content="caption", num_workers=num_workers),
        samples_per_epoch=20,
        seed=seed,
    )
    return list(islice(loader, num_batches))


def captions(found) -> list[str]:
    return [caption for batch in found for caption in batch["captions"]]


def test_streams_never_end_and_count_epochs(foreign):
    found = batches(foreign, 30)
    assert len(captions(found)) == 150
    assert [batch["epochs"][0].item() for batch in found[:9]] == [0] * 4 + [1] * 4 + [2]
    assert set(captions(found)) <= {f"c {number}" for number in range(50)}


def test_streams_are_reproducible(foreign):
    assert captions(batches(foreign, 10)) == captions(batches(foreign, 10))
    assert captions(batches(foreign, 10)) != captions(batches(foreign, 10, seed=1))


def test_ranks_take_different_shards(foreign):
    first, second = (
        {int(c.split()[1]) // 10 for c in captions(batches(foreign, 4, rank=rank, world_size=2))}
        for rank in range(2)
    )
    assert first
    assert second
    assert captions(batches(foreign, 4, world_size=2)) != captions(
        batches(foreign, 4, rank=1, world_size=2)
    )


def test_workers_take_different_shards(foreign):
    found = batches(foreign, 2, num_workers=2)
    first, second = ({int(c.split()[1]) // 10 for c in captions([batch])} for batch in found)
    assert first != second


def test_sample_ids_name_the_sample(foreign):
    by_id = {}
    for batch in batches(foreign, 40):
        for sample_id, caption in zip(batch["sample_ids"].tolist(), batch["captions"], strict=True):
            assert by_id.setdefault(sample_id, caption) == caption
    assert len(by_id) == len(set(by_id.values()))


def test_one_line_says_what_is_not_promised(foreign, caplog):
    with caplog.at_level(logging.WARNING):
        batches(foreign, 1)
    (record,) = caplog.records
    assert "without a manifest: the order depends on ranks and workers" in record.message


def test_a_broken_shard_is_logged_and_passed_over(foreign, caplog):
    (foreign / "s-2.tar").write_bytes(b"garbage " * 500)
    with caplog.at_level(logging.WARNING):
        found = batches(foreign, 30)
    assert len(captions(found)) == 150
    assert any("could not be read to its end" in record.message for record in caplog.records)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_that_are_all_missing_end_the_stream(tmp_path, num_workers):
    with pytest.raises(DataError) as caught:
        batches(f"{tmp_path}/x-{{0..3}}.tar", 1, num_workers=num_workers)
    message = original_message(caught.value)
    assert message.startswith("shards with samples were expected; none of 4 had any, the first, `")
    assert re.search(r"/x-[0-3]\.tar`: No such file or directory; check `train_shards`$", message)


def test_a_shard_without_samples_ends_a_stream_of_it_alone(tmp_path):
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(DataError, match=r"/empty\.tar`: it holds no samples; check"):
        batches(tmp_path, 1)


def test_a_single_sample_is_a_stream(tmp_path):
    with webdataset.ShardWriter(f"{tmp_path}/s-%d.tar", verbose=0) as writer:
        writer.write({"__key__": "a", "txt": "only"})
    assert captions(batches(tmp_path, 2)) == ["only"] * 10


def test_pipes_are_refused_unless_allowed():
    message = r"^`pipe:` shards run shell commands and need `allow_pipe: true`; got `pipe:cat x`; "
    with pytest.raises(ConfigError, match=message):
        stream_urls("pipe:cat x", allow_pipe=False)
    assert stream_urls("pipe:cat x", allow_pipe=True) == ["pipe:cat x"]


def test_brace_patterns_name_many_shards():
    assert len(stream_urls("/data/x-{000..009}.tar", allow_pipe=False)) == 10


def test_a_folder_without_shards(tmp_path):
    with pytest.raises(DataError, match=r"must name `\*.tar` shards; it names none"):
        stream_urls(str(tmp_path), allow_pipe=False)


def test_a_folder_with_a_manifest_is_no_stream(tmp_path, write_shards):
    write_shards(tmp_path, [1])
    with pytest.raises(ConfigError, match="`samples_per_epoch` is for streams without a manifest;"):
        stream_urls(str(tmp_path), allow_pipe=False)


def test_streams_of_images_need_a_size():
    with pytest.raises(ConfigError, match="streams of images need `image_size`; got none; set it"):
        stream_loader(
            ["x.tar"],
            BatchPlan(global_batch_size=1),
            BatchSettings(content="image"),
            samples_per_epoch=1,
            seed=0,
        )


def test_members_named_as_fields_of_the_reader_change_nothing(tmp_path):
    names = ("__padding__", "__fault__", "__index__", "__epoch__", "__position__", "txt")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in names:
            info = tarfile.TarInfo(f"a.{name}")
            info.size = 7
            archive.addfile(info, io.BytesIO(b"caption"))
    (batch,) = batches(tmp_path, 1)
    assert batch["captions"] == ["caption"] * len(batch["captions"])
    assert batch["valid"].all()
