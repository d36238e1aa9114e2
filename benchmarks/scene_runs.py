"""What the benchmarks on scenes share: running commands, and cells of their tables."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from segalign.run_directory import newest_checkpoint, stored_step

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str], log: Path) -> None:
    """Run a command of ours with one thread, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "main.py", *command],
            cwd=ROOT, check=True, stdout=out, stderr=out, env=environment,
        )  # fmt: skip


def finished(run_dir: Path, steps: int) -> bool:
    """Tell whether a run has taken its steps."""
    found = newest_checkpoint(run_dir)
    return found is not None and stored_step(found) >= steps


def cell(values: list[float]) -> str:
    """Format mean and range."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"
