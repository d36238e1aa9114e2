"""What webdataset by itself gives for shards that are damaged; ours loses nothing silently.

Only our side is asserted. ``pytest -s`` prints the table with theirs.
"""

import io
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from defects import encode
from PIL import Image
from webdataset import handlers

from segalign.data.accounts import RunAccounts
from segalign.data.limits import BadSampleLimits
from segalign.data.loaders import BatchSettings, open_shards, train_loader
from segalign.data.manifest import index_shards
from segalign.data.order import BatchPlan
from segalign.errors import DataError

COUNT, SIDE = 10, 16
Samples = list[tuple[str, bytes]]


def sound() -> Samples:
    """Name the members of ten samples, an image and a text each."""
    members = []
    for number in range(COUNT):
        image = encode(Image.new("RGB", (SIDE, SIDE), (20 * number, 5, 5)), "JPEG")
        members += [(f"{number:04d}.jpg", image), (f"{number:04d}.txt", b"a caption")]
    return members


def tar_of(members: Samples) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header(number: int) -> int:
    """Return where the header of a sample's image begins."""
    with tarfile.open(fileobj=io.BytesIO(tar_of(sound()))) as archive:
        return next(info.offset for info in archive if info.name == f"{number:04d}.jpg")


def damaged(change: Callable[[bytes], bytes]) -> bytes:
    return change(tar_of(sound()))


def with_members(change: Callable[[Samples], Samples]) -> bytes:
    return tar_of(change(sound()))


def replaced(number: int, suffix: str, content: bytes) -> bytes:
    name = f"{number:04d}.{suffix}"
    return with_members(lambda all_: [(n, content if n == name else c) for n, c in all_])


# Of each: the shard, and how many samples there really are in it.
ROWS = {
    "cut exactly before a header": (lambda: damaged(lambda raw: raw[: header(6)]), 10),
    "cut inside a header": (lambda: damaged(lambda raw: raw[: header(6) + 200]), 10),
    "cut inside a body": (lambda: damaged(lambda raw: raw[: header(6) + 600]), 10),
    "header with a bad checksum": (
        lambda: damaged(lambda raw: raw[: header(4)] + b"~" + raw[header(4) + 1 :]), 10,
    ),
    "header of zeros": (
        lambda: damaged(lambda raw: raw[: header(4)] + bytes(512) + raw[header(4) + 512 :]), 10,
    ),
    "JPEG that is garbage": (lambda: replaced(4, "jpg", b"\xff\xd8garbage"), 10),
    "text missing": (
        lambda: with_members(lambda all_: [m for m in all_ if m[0] != "0004.txt"]), 10,
    ),
    "caption not UTF-8": (lambda: replaced(4, "txt", b"\xff\xfe"), 10),
    "jpg and txt not adjacent": (
        lambda: with_members(lambda all_: sorted(all_, key=lambda m: m[0].rpartition(".")[2])), 10,
    ),
    "key twice in a row": (lambda: with_members(lambda all_: all_[:2] + all_), 11),
    "key in two places": (lambda: with_members(lambda all_: all_[:8] + all_[:2] + all_[8:]), 11),
    "names that lead outside": (
        lambda: with_members(lambda all_: [(f"../../etc/{n}", c) for n, c in all_]), 10,
    ),
    "file of no bytes": (lambda: b"", 10),
}  # fmt: skip


def theirs(path: Path, handler: Callable[[Exception], object]) -> str:
    """Read as webdataset's documentation does, and say what came."""
    number, error, handled = 0, "", []

    def handle(found: Exception) -> object:
        handled.append(found)
        return handler(found)

    stages = webdataset.WebDataset(str(path), shardshuffle=False, handler=handle)
    samples = stages.decode("pil", handler=handle).to_tuple("jpg", "txt", handler=handle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in samples:
                number += 1
        except Exception as found:  # noqa: BLE001 - whatever it raises is what is told
            error = type(found).__name__
    said = error or (f"{len(handled)} warnings" if handled else "nothing said")
    return f"{number}, {said}"


def ours(folder: Path, num_there: int) -> str:
    """Index and read once; every sample must be delivered or told."""
    try:
        manifest = index_shards(folder)
    except DataError:
        return "refused"
    assert open_shards(folder).num_samples == num_there
    accounts = RunAccounts(BadSampleLimits(1.0, 1.0))
    accounts.expect("train", manifest)
    accounts.begin_training(0, None)
    settings = BatchSettings(content="image", image_size=SIDE)
    batches = train_loader(manifest, BatchPlan(global_batch_size=num_there), settings, seed=0)
    accounts.consume(next(iter(batches)), "train", 0)
    ledger = accounts.stages["train"]
    assert ledger.delivered + ledger.num_quarantined == num_there
    assert len(ledger.records) == ledger.num_quarantined
    told = [f"{record['reason']} of key {record['key']}" for record in ledger.records]
    return ", ".join([str(ledger.delivered), *told])


@pytest.fixture(scope="module")
def table():
    """The rows that the tests have filled."""
    rows: list[str] = []
    yield rows
    head = "| defect | reraise_exception | warn_and_continue | ours |\n|---|---|---|---|"
    sys.stdout.write("\n".join(["", head, *rows, ""]))


@pytest.mark.parametrize("name", ROWS)
def test_ours_loses_nothing_silently(tmp_path, monkeypatch, table, name):
    make, num_there = ROWS[name]
    (tmp_path / "x.tar").write_bytes(make())
    monkeypatch.setattr(time, "sleep", lambda _: None)  # half a second for each warning
    found = [
        theirs(tmp_path / "x.tar", handler)
        for handler in (handlers.reraise_exception, handlers.warn_and_continue)
    ]
    table.append(f"| {name} | {found[0]} | {found[1]} | {ours(tmp_path, num_there)} |")
