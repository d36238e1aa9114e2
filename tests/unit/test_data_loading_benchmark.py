"""The benchmark of data loading runs, compares equal work, and its stored result is of its form."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_loading, data_loading_arms
from segalign.data.images import decode_image

ROOT = Path(__file__).parents[2]
SPREADS = (
    "of_bare",
    "datamodule_to_it",
    "of_bare_by_processor",
    "datamodule_to_it_by_processor",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    data_loading.main(["--quick", "--workers", "0", "1", "--results", str(folder)])
    return folder


def check_form(found: dict, text: str) -> None:
    assert found["speed"].keys() == {str(workers) for workers in found["setting"]["workers"]}
    for arms in found["speed"].values():
        assert arms.keys() == data_loading_arms.ARMS.keys()
        for name, row in arms.items():
            assert f"| {name} |" in text
            assert len(row["runs"]) == found["setting"]["rounds"]
            assert row["samples_per_second"] > 0
            assert all(row[column] == sorted(row[column]) for column in SPREADS)
    positions = found["resume"]["positions"]
    assert list(positions) == ["0", "1000", "1000000", "1000000000"]
    assert all(row["seconds"] >= row["setup_seconds"] >= 0 for row in positions.values())
    assert {"cores", "load_before", "torch", "pillow"} <= found["machine"].keys()


def test_a_tiny_run_has_the_form(results):
    found = json.loads((results / "data_loading.json").read_text())
    check_form(found, (results / "data_loading.md").read_text())
    # What is read for a first batch does not grow with the position.
    read = [row["megabytes"] for row in found["resume"]["positions"].values()]
    assert max(read) <= 1.5 * min(read)


def test_the_stored_result_has_the_form():
    folder = ROOT / "benchmarks" / "results"
    found = json.loads((folder / "data_loading.json").read_text())
    check_form(found, (folder / "data_loading.md").read_text())
    assert found["resume"]["num_samples"] >= 10**6
    assert found["setting"]["side"] == 512


def test_all_ways_do_the_same_work(tmp_path):
    work = data_loading_arms.Work.make(tmp_path, 8, 0.1, side=32, batch_size=8, num_workers=0)
    ours = next(data_loading_arms.from_datamodule(work))
    texts = {path.read_text() for path in work.files.glob("*.txt")}
    assert set(ours["captions"]) == texts
    assert all(len(text.split()) > 100 for text in texts)
    files, _ = next(data_loading_arms.map_style(work))
    shards, _ = next(data_loading_arms.plain_webdataset(work))
    # In other orders, and the others reduce no JPEG while they decode it.
    for images in (files, shards):
        assert images.shape == ours["images"].shape == (8, 3, 32, 32)
        means = [sorted(batch.mean((1, 2, 3)).tolist()) for batch in (images, ours["images"])]
        np.testing.assert_allclose(*means, atol=0.01)
    raw = next(work.files.glob("*.jpg")).read_bytes()
    plain = np.asarray(data_loading_arms.plain_decode(raw, 32)).astype(int)
    assert np.abs(plain - decode_image(raw, 32)).max() <= 4
