"""Fuzz the readers of foreign files, guided by coverage: ``python tests/fuzz/run.py --minutes 10``.

The targets are imported once, instrumented; each is fuzzed in a fork of its own, two at a time.
What crashes one is kept under ``--out`` and named at the end; the exit code is then 1.
"""

import argparse
import hashlib
import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import atheris

HERE = Path(__file__).parent
_EXECUTIONS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_CRASH = re.compile(r"=== Uncaught Python exception: ===\s*\n(.*)")
_MAX_INPUT = 16_384


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz for as long as was asked, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all targets together")
    parser.add_argument("--out", type=Path, help="folder of logs, inputs and crashes")
    parser.add_argument("--target", action="append", default=[], help="only these")
    parser.add_argument("--processes", type=int, default=2, help="fuzzed at a time")
    options = parser.parse_args(argv)
    out = options.out or Path(tempfile.mkdtemp(prefix="fuzzing-"))
    targets = import_targets()
    chosen = options.target or list(targets)
    seconds = max(1, round(60 * options.minutes * options.processes / len(chosen)))
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        tempfile.tempdir = place  # a fuzzer ends without cleaning up
        codes = dict(fuzz_all(targets, chosen, out, seconds, options.processes))
    for name in chosen:
        say(f"{name:<18}{describe(out / name, codes[name])}")
    total = sum(executions(out / name) for name in chosen)
    say(f"{total:,} executions, {sum(map(bool, codes.values()))} crashes; logs in {out}")
    return 1 if any(codes.values()) else 0


def say(line: str) -> None:
    """Tell the user."""
    sys.stdout.write(line + "\n")


def import_targets() -> dict:
    """Import the targets and what they read with, instrumented."""
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    import torch

    torch.set_num_threads(1)
    # Torch and what belongs to it is not ours, and slow when instrumented.
    for name in ("diffusers.models.unets.unet_2d_condition", "peft", "transformers"):
        importlib.import_module(name)

    with atheris.instrument_imports(include=["segalign", "sentencex", "tarfile", "yaml"]):
        import fuzz_targets
    return fuzz_targets.TARGETS


def fuzz_all(
    targets: dict, chosen: Sequence[str], out: Path, seconds: int, processes: int
) -> Iterator[tuple[str, int]]:
    """Fuzz targets, several at a time; yield the name and exit code of each that ends."""
    waiting, running = list(chosen), {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            running[start(targets[name], name, out / name, seconds)] = name
        for child in list(running):
            process, status = os.waitpid(child, os.WNOHANG)
            if process:
                yield running.pop(child), os.waitstatus_to_exitcode(status)
        time.sleep(0.05)


def start(target: tuple, name: str, folder: Path, seconds: int) -> int:
    """Fuzz one target in a fork; return its process id."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        for number, seed in enumerate(target.seeds()):
            (inputs / f"seed-{number}").write_bytes(seed)
        options = (
            f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=4096",
            f"-max_len={_MAX_INPUT}", "-print_final_stats=1", "-seed=1",
            f"-artifact_prefix={folder}/", str(inputs),
        )  # fmt: skip
        atheris.Setup([name, *options], partial(try_on, target, folder))
        atheris.Fuzz()
    finally:
        os._exit(3)  # what is reached only by an error before the fuzzing


def try_on(target: tuple, folder: Path, data: bytes) -> None:
    """Try one input, and keep it if it crashes."""
    try:
        target.try_on(data)
    except BaseException:
        (folder / f"crash-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
        raise


def executions(folder: Path) -> int:
    """Read how many inputs were tried."""
    found = _EXECUTIONS.search((folder / "log.txt").read_text(errors="replace"))
    return int(found[1]) if found else 0


def describe(folder: Path, code: int) -> str:
    """Say in one line how a target did."""
    if code == 0:
        return f"{executions(folder):>9,} executions, no crash"
    reason = _CRASH.search((folder / "log.txt").read_text(errors="replace"))
    found = sorted(path.name for path in folder.glob("*-*") if path.is_file())
    return f"exit code {code}: {reason[1] if reason else 'see log.txt'} ({', '.join(found)})"


if __name__ == "__main__":
    sys.exit(main())
