"""A long run holds no more memory, files, threads and processes than a short one."""

import json
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import broken_resources
import numpy as np
import pytest
import yaml
from PIL import Image

from segalign.data.packing import pack
from segalign.data.sources import FolderSource

_logger = logging.getLogger(__name__)
MEGABYTE = 1e6
COUNTS = ("files", "threads", "children")
# Lists and caches that are bounded fill up, and the allocator keeps the largest blocks that it ever
# needed: a step, a validation, a checkpoint and an epoch must have come several times.
WARM_UP = 1000


@dataclass(frozen=True)
class Length:
    """How long a run is watched, and how much its memory may grow meanwhile.

    Attributes:
        steps: Optimizer steps of the run.
        warm_up: Steps that do not count.
        megabytes: Of growth in 1000 steps.
    """

    steps: int = 5000
    warm_up: int = WARM_UP
    megabytes: float = 1.0

    @property
    def interval(self) -> int:
        """Steps between two validations; checkpoints are half as frequent."""
        return self.steps // 20


SHORT = Length(steps=400, warm_up=100, megabytes=10.0)
NIGHT = Length(steps=50_000)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Pack 256 tiny photographs with captions."""
    root = tmp_path_factory.mktemp("photographs")
    draws = np.random.default_rng(0)
    for number in range(256):
        pixels = draws.integers(0, 255, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03d}.jpg")
        (root / f"{number:03d}.txt").write_text(f"Photograph number {number}. " * 8)
    folder = root / "shards"
    pack(FolderSource(root), folder, samples_per_shard=32)
    return folder


def command(folder: Path, shards: Path, num_workers: int, length: Length) -> list[str]:
    """Compose a fit with the real datamodule, logs, validations and checkpoints."""
    data = {
        "train_shards": str(shards),
        "val_shards": str(shards),
        "limit_val_samples": 8,
        "image_size": 32,
        "global_batch_size": 2,
        "num_workers": num_workers,
        "shuffle_window": 2,
        "report_dir": str(folder / "run"),
    }
    watch = {"every_n_steps": max(length.steps // 100, 5)}
    config: dict[str, Any] = {
        "seed_everything": 7,
        "model": {"class_path": "toy_resources.PixelModule"},
        "data": {
            "class_path": "datamodules.long_caption.LongCaptionDataModule",
            "init_args": data,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": length.steps,
            "log_every_n_steps": 5,
            "val_check_interval": length.interval,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "callbacks.ema.EMA"},
                {"class_path": "toy_resources.ResourceLog", "init_args": watch},
            ],
        },
        "checkpoint": {"every_n_steps": 2 * length.interval},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    files = [f"--config={folder / 'config.yaml'}", f"--run_dir={folder / 'run'}"]
    return ["fit", "--allow_import=toy_resources", *files]


def check_growth(folder: Path, length: Length) -> None:
    """Assert what has not grown, from the samples of a run."""
    lines = (folder / "run" / "resources.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    samples = [sample for sample in samples if sample["step"] > length.warm_up]
    assert samples[-1]["step"] == length.steps
    grown = [*grown_counts(samples), *grown_memory(samples, length)]
    assert not grown, "; ".join(grown)


def grown_counts(samples: list[dict[str, int]]) -> list[str]:
    """Compare the first quarter with the last, so that a moment's file or thread is no growth."""
    quarter, grown = len(samples) // 4, []
    for name in COUNTS:
        parts = (samples[:quarter], samples[-quarter:])
        before, after = (statistics.median(sample[name] for sample in part) for part in parts)
        if after > before:
            grown.append(f"{name} grew from {before} to {after}")
    return grown


def grown_memory(samples: list[dict[str, int]], length: Length) -> list[str]:
    """Fit a line to the memory."""
    steps, memory = ([sample[name] for sample in samples] for name in ("step", "memory"))
    slope = float(np.polyfit(steps, memory, 1)[0]) * 1000 / MEGABYTE
    _logger.info("memory: %+.3f MB in 1000 steps; at the end %s", slope, samples[-1])
    if slope < length.megabytes:
        return []
    return [f"memory grew by {slope:.2f} MB in 1000 steps"]


def check_resources(
    server, folder: Path, shards: Path, num_workers: tuple[int, ...], length: Length, broken=()
) -> None:
    """Train, with each of these numbers of workers at a time, and look at what is held."""
    runs = [folder / f"{workers} workers" for workers in num_workers]
    started = [
        server.start(command(run, shards, workers, length), folder / "log.txt", broken=broken)
        for run, workers in zip(runs, num_workers, strict=True)
    ]
    codes = [server.wait(process, seconds=3600) for process in started]
    assert not any(codes), (folder / "log.txt").read_text()
    for run in runs:
        check_growth(run, length)


@pytest.mark.timeout(3600)
def test_a_long_run_holds_no_more_than_a_short_one(server, tmp_path, shards, is_nightly):
    # With a worker there is more to hold, and all of what there is without.
    workers = (0, 1) if is_nightly else (1,)
    check_resources(server, tmp_path, shards, workers, NIGHT if is_nightly else Length())


def test_a_short_run_shows_what_is_kept(server, tmp_path, shards):
    # So that what follows fails for what is broken, and not for being short.
    check_resources(server, tmp_path, shards, (1,), SHORT)


BROKEN = (
    broken_resources.keeps_every_batch,
    broken_resources.opens_a_file_each_step,
    broken_resources.never_closes_a_shard,
    broken_resources.starts_a_thread_each_validation,
    broken_resources.keeps_the_workers_of_each_validation,
)
GROWING = ("memory", "files", "files", "threads", "children")


@pytest.mark.parametrize(("broken", "what"), [*zip(BROKEN, GROWING, strict=True)])
def test_a_run_that_keeps_things_is_caught_broken(
    server, tmp_path, shards, broken, what, is_nightly
):
    if broken not in BROKEN[:2] and not is_nightly:
        pytest.skip("some seconds each")
    name = f"broken_resources.{broken.__name__}"
    with pytest.raises(AssertionError, match=rf"{what} grew"):
        check_resources(server, tmp_path, shards, (1,), SHORT, broken=(name,))
