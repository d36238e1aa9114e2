import io
import json
import tarfile
import time

import pytest
import webdataset

from segalign.data.manifest import MANIFEST_NAME, index_shards, load_manifest, write_manifest
from segalign.data.tarfiles import Member, Sample, ShardIndex
from segalign.errors import DataError


def rewrite_header(folder, change) -> None:
    path = folder / MANIFEST_NAME
    first, _, rest = path.read_bytes().partition(b"\n")
    header = json.loads(first)
    change(header)
    path.write_bytes(json.dumps(header).encode() + b"\n" + rest)


def test_written_manifest_equals_the_index_of_its_shards(tmp_path, write_shards):
    written = write_shards(tmp_path, [3, 2])
    samples = list(written)
    indexed = index_shards(tmp_path)
    assert [entry for entry, _ in indexed] == [entry for entry, _ in samples]
    assert list(load_manifest(tmp_path)) == samples
    assert indexed.digest == written.digest
    assert indexed.num_samples == 5


def test_locate_finds_shard_and_place(tmp_path, write_shards):
    manifest = write_shards(tmp_path, [3, 0, 2])
    places = [manifest.locate(sample_id) for sample_id in range(5)]
    assert places == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]


def test_digest_depends_on_content_and_order(tmp_path, write_shards):
    first = write_shards(tmp_path / "a", [2, 1])
    second = write_shards(tmp_path / "b", [2, 1])
    other = write_shards(tmp_path / "c", [1, 2])
    assert first.digest == second.digest != other.digest


def test_foreign_shards_of_shard_writer_are_indexed(tmp_path, plain_image):
    pattern = str(tmp_path / "foreign-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:03d}", "JPG": plain_image(), "txt": f"c {number}"})
    manifest = index_shards(tmp_path)
    assert manifest.shard_sizes == [4, 4, 2]
    _, sample = list(manifest)[9]
    assert sample.key == "009"
    raw = (tmp_path / "foreign-002.tar").read_bytes()
    contents = {m.suffix: raw[m.offset : m.offset + m.size] for m in sample.members}
    assert contents == {"jpg": plain_image(), "txt": b"c 9"}


def test_long_member_names_and_extra_members_are_indexed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("__meta__", "folder/" + "k" * 150 + ".txt", "README", "folder/b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"ab"))
        archive.addfile(tarfile.TarInfo("folder"))
    keys = [sample.key for _, sample in index_shards(tmp_path)]
    assert keys == ["folder/" + "k" * 150, "folder/b"]


def test_large_manifests_load_fast(tmp_path):
    member = Member("png", 512, 1000, 1)
    for number in range(100):
        (tmp_path / f"{number}.tar").touch()
    write_manifest(
        tmp_path,
        [
            ShardIndex(
                f"{n}.tar", 0, "0" * 64, [Sample(f"{k:09d}", (member,)) for k in range(1000)]
            )
            for n in range(100)
        ],
    )
    start = time.perf_counter()
    manifest = load_manifest(tmp_path)
    assert manifest.num_samples == 100_000
    assert manifest.samples(57)[999].key == "000000999"
    assert time.perf_counter() - start < 0.1


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"a folder of shards was expected; `.*nowhere` is none; "):
        load_manifest(tmp_path / "nowhere")


def test_foreign_folder_without_manifest(tmp_path):
    (tmp_path / "a.tar").touch()
    message = r"`.*` must hold `manifest.jsonl`; it has none; run `python main.py shards index .*`$"
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path)


def test_missing_shard(tmp_path, write_shards):
    write_shards(tmp_path, [1, 1])
    (tmp_path / "shard-000001.tar").unlink()
    message = (
        r"^shard `.*shard-000001.tar` must be there, the manifest lists it; got: "
        r"No such file or directory; bring it back or run `shards index --force .*`$"
    )
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path).check_files()


def test_shard_of_another_size(tmp_path, write_shards):
    write_shards(tmp_path, [1])
    (tmp_path / "shard-000000.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"must have 10240 bytes by the manifest; got 5; copy it"):
        load_manifest(tmp_path).check_files()


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/b.tar", ".hidden.tar", "x.zip", ""])
def test_shard_names_are_not_trusted_as_paths(tmp_path, write_shards, name):
    write_shards(tmp_path, [1])
    rewrite_header(tmp_path, lambda header: header["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"is no plain file name of a shard; run `python main.py"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["shards"][0].update(sha256="0" * 64),
        lambda header: header.update(version=99),
        lambda header: header.pop("shards"),
        lambda header: header["shards"][0].pop("size"),
    ],
)
def test_damaged_headers(tmp_path, write_shards, change):
    write_shards(tmp_path, [1])
    rewrite_header(tmp_path, change)
    with pytest.raises(DataError, match=r"must be a sound manifest; got: .*; run "):
        load_manifest(tmp_path)


def test_damaged_lines(tmp_path, write_shards):
    write_shards(tmp_path, [1])
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'"000000"', b'"000001"'))
    with pytest.raises(DataError, match=r"the line of `shard-000000.tar` does not match its check"):
        load_manifest(tmp_path).samples(0)


def test_index_of_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match=r"must hold `\*.tar` shards; it has none; "):
        index_shards(tmp_path)


def cut_before_header(raw: bytes) -> bytes:
    return raw[: 2 * 1024]


def cut_inside_header(raw: bytes) -> bytes:
    return raw[: 2 * 1024 + 100]


def cut_inside_content(raw: bytes) -> bytes:
    return raw[: 2 * 1024 + 512 + 3]


def break_header_checksum(raw: bytes) -> bytes:
    return raw[:2050] + b"~" + raw[2051:]


def zero_header(raw: bytes) -> bytes:
    return raw[:2048] + bytes(512) + raw[2560:]


def be_empty(raw: bytes) -> bytes:
    return b""


def be_garbage(raw: bytes) -> bytes:
    return b"garbage " * 1000


@pytest.mark.parametrize(
    "damage",
    [
        cut_before_header,
        cut_inside_header,
        cut_inside_content,
        break_header_checksum,
        zero_header,
        be_empty,
        be_garbage,
    ],
)
def test_no_damage_to_a_tar_goes_unnoticed(tmp_path, write_shards, damage):
    write_shards(tmp_path, [3], lambda number: [("txt", b"hello")])
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"^shard `.*shard-000000.tar` must be [^\n]*$"):
        index_shards(tmp_path)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.jpg", "b.jpg", "a.txt"], "the members of key `a` in two places"),
        (["a.jpg", "a.jpg"], "two members `a.jpg`"),
    ],
)
def test_members_of_one_key_must_be_adjacent_and_different(tmp_path, names, found):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match=found):
        index_shards(tmp_path)
