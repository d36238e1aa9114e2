"""How much faster two processes pack small images than one.

Run it on a machine with at least two idle cores; runs of both kinds alternate, and the best of
each counts::

    python benchmarks/packing.py --num-images 10000 --rounds 3
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from segalign.data.packing import pack
from segalign.data.sources import FolderSource


def make_images(folder: Path, num_images: int, side: int) -> None:
    """Write images of noise and a caption for each."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        if number % 1000 == 0:
            part = folder / f"{number // 1000:03d}"
            part.mkdir(parents=True)
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(part / f"{number:06d}.jpg", quality=90)
        (part / f"{number:06d}.txt").write_text(f"picture number {number} " * 20)


def time_pack(images: Path, out: Path, num_processes: int, check: str) -> tuple[float, float]:
    """Return wall and critical CPU seconds of one pack, listing the source included.

    Critical CPU seconds are those of the parent and of one child, as if each had a core of its
    own: unlike wall seconds they hardly depend on what else the machine does.
    """
    shutil.rmtree(out, ignore_errors=True)
    children, own, start = _cpu(resource.RUSAGE_CHILDREN), time.process_time(), time.perf_counter()
    report = pack(
        FolderSource(images, check=check),
        out,
        samples_per_shard=500,
        num_processes=num_processes,
        title=f"{num_processes} processes",
    )
    wall = time.perf_counter() - start
    critical = time.process_time() - own
    critical += (_cpu(resource.RUSAGE_CHILDREN) - children) / num_processes
    assert not report.set_aside
    return wall, critical


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def run(num_images: int, rounds: int, side: int, check: str) -> dict[str, object]:
    """Measure and return seconds and ratios."""
    wall: dict[int, list[float]] = {1: [], 2: []}
    critical: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        make_images(images, num_images, side)
        for _ in range(rounds):
            for num_processes in wall:
                seconds = time_pack(images, Path(folder) / "out", num_processes, check)
                wall[num_processes].append(round(seconds[0], 3))
                critical[num_processes].append(round(seconds[1], 3))
    return {
        "num_images": num_images,
        "side": side,
        "check": check,
        "wall_seconds_1": wall[1],
        "wall_seconds_2": wall[2],
        "wall_ratio_of_best": round(min(wall[1]) / min(wall[2]), 2),
        "critical_cpu_seconds_1": critical[1],
        "critical_cpu_seconds_2": critical[2],
        "critical_cpu_ratio_of_best": round(min(critical[1]) / min(critical[2]), 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Parse the command line and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=256, help="pixels of an image's side")
    parser.add_argument("--check", choices=["none", "header", "full"], default="full")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options.num_images, options.rounds, options.side, options.check)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<28}{value}")


if __name__ == "__main__":
    main()
