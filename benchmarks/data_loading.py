"""Samples per second of the datamodule against bare decoding, files and plain webdataset.

    python benchmarks/data_loading.py
    python benchmarks/data_loading.py --workers 1 2 4 --rounds 15
    python benchmarks/data_loading.py --quick --results FOLDER

Photographs are noise of their spectrum, 640 x 512 to 1024 x 768, as JPEG of quality 90; captions
have 120 words. Each way of loading makes batches of square images on the same number of worker
processes; bare decoding keeps its files in memory and throws the pixels away in the worker. They
take turns, and ratios are taken within a turn, so that what else the machine does falls on all.
Goal: the datamodule delivers at least 0.9 of what bare decoding would, judged by processor time,
which hardly depends on what else the machine does.

Besides: how long the first batch of a resumed run takes, by position, with a million samples.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL
import psutil
import torch
import webdataset

from benchmarks.data_loading_arms import ARMS, BARE, DATAMODULE, Work, datamodule, write_many
from segalign.data.loaders import open_shards
from segalign.data.sequence import sequence_state

RESULTS = Path(__file__).parent / "results"
GOAL = 0.9
POSITIONS = (0, 10**3, 10**6, 10**9)
QUICK = {
    "images": 16,
    "side": 32,
    "scale": 0.1,
    "rounds": 1,
    "batches": 2,
    "shards": 8,
    "shard_samples": 20,
}


def cpu_seconds() -> tuple[float, float]:
    """Return the processor time of this process, and of all of its workers."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children())]
    seconds = [one.user + one.system for one in times]
    return seconds[0], sum(seconds[1:])


def measure_arm(
    make: Callable[[Work], Iterator[Any]], work: Work, num_batches: int
) -> dict[str, float]:
    """Return samples per second in steady state, and milliseconds of processors per sample.

    Critical milliseconds are those of the slower side: this process, or a worker's share. They are
    what a sample takes when every process has a core, and hardly depend on what else runs.
    """
    batches = make(work)
    # What workers have made before they are asked: two batches each.
    for _ in range(3 * max(work.num_workers, 1)):
        next(batches)
    used, start = cpu_seconds(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    seconds = time.perf_counter() - start
    samples = num_batches * work.batch_size
    main, workers = (
        1000 * (after - before) / samples for before, after in zip(used, cpu_seconds(), strict=True)
    )
    return {
        "samples_per_second": samples / seconds,
        "main_ms": main,
        "worker_ms": workers,
        "critical_ms": max(main, workers / max(work.num_workers, 1)),
    }


def measure_speed(work: Work, rounds: int, num_batches: int) -> dict[str, Any]:
    """Let all take turns; every second turn goes the other way round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(rounds):
        for name in list(ARMS)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(measure_arm(ARMS[name], work, num_batches))
    return {name: summary(runs, found[BARE], found[DATAMODULE]) for name, runs in found.items()}


def summary(
    runs: list[dict[str, float]], bare: list[dict[str, float]], ours: list[dict[str, float]]
) -> dict[str, Any]:
    """Take medians, and the ratios turn by turn."""
    rates = [[run["samples_per_second"] for run in arm] for arm in (runs, bare, ours)]
    critical = [[run["critical_ms"] for run in arm] for arm in (runs, bare, ours)]
    columns = {
        name: round(statistics.median(run[name] for run in runs), 3)
        for name in ("main_ms", "worker_ms", "critical_ms")
    }
    return {
        "runs": [{name: round(value, 3) for name, value in run.items()} for run in runs],
        "samples_per_second": round(statistics.median(rates[0]), 2),
        **columns,
        "of_bare": spread(rates[0], rates[1]),
        "datamodule_to_it": spread(rates[2], rates[0]),
        "of_bare_by_processor": spread(critical[1], critical[0]),
        "datamodule_to_it_by_processor": spread(critical[0], critical[2]),
    }


def spread(ours: list[float], theirs: list[float]) -> list[float]:
    """Return lowest, median and highest of the ratios of each turn."""
    # Processor time is counted in hundredths of a second: a tiny run may have used none.
    ratios = sorted(one / max(other, 1e-9) for one, other in zip(ours, theirs, strict=True))
    return [round(value, 3) for value in (ratios[0], statistics.median(ratios), ratios[-1])]


def read_characters() -> int:
    """Return the bytes that this process has read so far."""
    return int(psutil.Process().io_counters().read_chars)


def measure_resume(work: Work, rounds: int) -> dict[str, Any]:
    """Time the first batch of runs that resume at several positions of the sequence."""
    found: dict[int, dict[str, list[float]]] = {
        position: {"seconds": [], "setup_seconds": [], "megabytes": []} for position in POSITIONS
    }
    manifest = open_shards(work.shards)
    for _ in range(rounds):
        for position, columns in found.items():
            step = position // work.batch_size
            state = sequence_state(manifest, step, work.batch_size, seed=0)
            before, start = read_characters(), time.perf_counter()
            module = datamodule(work)
            columns["setup_seconds"].append(time.perf_counter() - start)
            module.load_state_dict(dict(state))
            next(iter(module.train_dataloader()))
            columns["seconds"].append(time.perf_counter() - start)
            columns["megabytes"].append((read_characters() - before) / 1e6)
    rows = {
        str(position): {name: round(statistics.median(c), 4) for name, c in columns.items()}
        for position, columns in found.items()
    }
    size = (work.shards / "manifest.jsonl").stat().st_size
    return {
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "manifest_megabytes": round(size / 1e6, 2),
        "positions": rows,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the data and measure all."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"side": options.side, "batch_size": options.batch_size, "num_workers": 0}
        work = Work.make(Path(folder), options.images, options.scale, **settings)
        sizes = [path.stat().st_size for path in work.files.glob("*.jpg")]
        before = os.getloadavg()[0]
        speed = {
            str(workers): measure_speed(
                replace(work, num_workers=workers), options.rounds, options.batches
            )
            for workers in options.workers
        }
        large = Path(folder) / "large"
        write_many(work.files, large, options.shards, options.shard_samples)
        resume = measure_resume(replace(work, shards=large), options.rounds)
    return {
        "setting": {k: v for k, v in vars(options).items() if k not in ("results", "quick")},
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "kind": platform.machine(),
            "load_before": round(before, 1),
            "load_after": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "webdataset": webdataset.__version__,
        },
        "kilobytes_of_a_file": round(statistics.fmean(sizes) / 1000, 1),
        "speed": speed,
        "resume": resume,
    }


def to_text(found: dict[str, Any]) -> str:
    """Write the tables."""
    setting, machine, resume = found["setting"], found["machine"], found["resume"]
    lines = [
        "# How fast data are loaded",
        "",
        (
            f"`python benchmarks/data_loading.py`: JPEG files of {found['kilobytes_of_a_file']} kB "
            f"on average, cropped to {setting['side']} px, batches of {setting['batch_size']}; "
            f"medians of {setting['rounds']} turns, ratios with lowest and highest. Milliseconds "
            "of processors are those of a sample; ratios by processor time compare the slower of "
            "the main process and a worker's share, that is the speed with a core for each. "
            f"{machine['cores']} cores ({machine['kind']}), load "
            f"{machine['load_before']} before and {machine['load_after']} after; torch "
            f"{machine['torch'].partition('+')[0]}, Pillow {machine['pillow']}, webdataset "
            f"{machine['webdataset']}."
        ),
        "",
    ]
    for workers, arms in found["speed"].items():
        lines += speed_table(workers, arms)
    lines += [
        (
            f"The first batch of a resumed run, of {resume['num_samples']:,} samples in "
            f"{resume['num_shards']:,} shards (a manifest of {resume['manifest_megabytes']} MB), "
            "without workers; reading and checking the manifest's header is part of it. A loader "
            "that skips what it has delivered needs the time of all samples before."
        ),
        "",
        "| position | manifest opened | first batch | read |",
        "|---|---|---|---|",
    ]
    for position, row in resume["positions"].items():
        lines.append(
            f"| {int(position):,} | {row['setup_seconds']:.3f} s | {row['seconds']:.3f} s | "
            f"{row['megabytes']:.2f} MB |"
        )
    return "\n".join(lines) + "\n"


def speed_table(workers: str, arms: dict[str, Any]) -> list[str]:
    """Write the table of one number of workers."""
    lines = [
        f"Worker processes: {workers}.",
        "",
        (
            "| way of loading | main, ms | workers, ms | of bare, by processor time | datamodule "
            "is | samples/s | of bare, by the clock |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in arms.items():
        cells = [name, f"{row['main_ms']:.2f}", f"{row['worker_ms']:.2f}"]
        cells += [as_text(row["of_bare_by_processor"])]
        cells += [f"{row['datamodule_to_it_by_processor'][1]:.2f}x"]
        cells += [f"{row['samples_per_second']:.1f}", as_text(row["of_bare"])]
        lines.append(f"| {' | '.join(cells)} |")
    reached = arms[DATAMODULE]["of_bare_by_processor"][1]
    is_met = "met" if reached >= GOAL else "not met"
    return [*lines, "", f"Goal: {GOAL} of bare, by processor time: {reached:.2f}, {is_met}.", ""]


def as_text(ratios: list[float]) -> str:
    """Write a median with lowest and highest."""
    return f"{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--side", type=int, default=512, help="pixels of the squares")
    parser.add_argument("--scale", type=float, default=1.0, help="of the photographs' sizes")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=10, help="timed in a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--shards", type=int, default=1_100, help="of the resumed run")
    parser.add_argument("--shard-samples", type=int, default=1_000, help="in each of these")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    torch.set_num_threads(1)
    found = measure(options)
    text = to_text(found)
    print(text, end="")
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "data_loading.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.results / "data_loading.md").write_text(text)
    return found


if __name__ == "__main__":
    main()
