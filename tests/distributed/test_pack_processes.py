"""Packing in several processes, killed and started again."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from segalign.data.manifest import load_manifest
from segalign.data.packing import pack
from segalign.data.sources import FolderSource


def image_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png", compress_level=1)
        (folder / f"{number:05d}.txt").write_text(f"picture {number}")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Digests of shards and manifest."""
    names = [*folder.glob("*.tar"), folder / "manifest.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def captions(folder: Path) -> list[str]:
    urls = [str(folder / entry.name) for entry in load_manifest(folder).shards]
    return [sample["txt"].decode() for sample in webdataset.WebDataset(urls, shardshuffle=False)]


PACK = """
import sys
from pathlib import Path
from segalign.data.packing import pack
from segalign.data.sources import FolderSource
if __name__ == "__main__":
    pack(FolderSource(Path(sys.argv[1])), Path(sys.argv[2]), samples_per_shard=50, num_processes=2)
"""


def start_pack(script: Path, images: Path, out: Path, repository: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(script), str(images), str(out)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        stderr=subprocess.DEVNULL,
    )


def finished_shards(out: Path) -> int:
    return len(list(out.glob(".shard-*.json")))


def kill_after(process: subprocess.Popen, out: Path, num_shards: int) -> None:
    deadline = time.monotonic() + 60
    while finished_shards(out) < num_shards and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.distributed
def test_a_pack_killed_twice_ends_as_if_never_killed(tmp_path, repository):
    images = image_folder(tmp_path / "images", 3000)
    script = tmp_path / "script.py"
    script.write_text(PACK)
    out = tmp_path / "out"
    for num_shards in (5, 25):
        kill_after(start_pack(script, images, out, repository), out, num_shards)
        assert not (out / "manifest.jsonl").exists()
    kept = finished_shards(out)
    assert 25 <= kept < 60
    (out / ".shard-000059.tar.tmp-1").write_bytes(b"half a shard")
    assert start_pack(script, images, out, repository).wait() == 0
    pack(FolderSource(images), tmp_path / "straight", samples_per_shard=50)
    assert contents(out) == contents(tmp_path / "straight")
    assert captions(out) == [f"picture {number}" for number in range(3000)]
    assert not list(out.glob(".*tmp*"))
