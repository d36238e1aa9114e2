"""Runs of the toy on one or two ranks, which a server starts, or Lightning itself."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
from command_client import CommandServer
from command_server import end_with

from segalign.run_directory import newest_checkpoint

LAYER = """\
trainer:
  devices: {num_ranks}
  strategy: {strategy}
  limit_val_batches: 1.0
  val_check_interval: 4
  check_val_every_n_epoch: null
  callbacks: [callbacks.ema.EMA, toy_crash.RankLossRecorder]
"""
_ARGUMENTS = "TOY_ARGUMENTS"


class RankRuns:
    """Starts fits and waits for their ends.

    Args:
        server: Starts processes.
        config: Of the toy.
        folder: For its own files.
        num_ranks: Of a run.
    """

    def __init__(self, server: CommandServer, config: Path, folder: Path, num_ranks: int = 2):
        self.server, self.folder, self.num_ranks = server, folder, num_ranks
        folder.mkdir(exist_ok=True)
        layer = folder / "ranks.yaml"
        strategy = "ddp" if num_ranks > 1 else "auto"
        layer.write_text(LAYER.format(num_ranks=num_ranks, strategy=strategy))
        modules = ["toy_house", "toy_crash", "toy_signals", "toy_hangs"]
        permissions = [f"--allow_import={name}" for name in modules]
        configs = [f"--config={path}" for path in (config, layer)]
        self.fixed = ["fit", *permissions, *configs, "--ckpt_path=auto"]

    def start(
        self,
        run_dir: Path,
        *options: str,
        is_launched: bool = False,
        variables: dict[str, str] | None = None,
        broken: tuple[str, ...] = (),
    ) -> list[int]:
        """Start a fit; returns the processes that the server has started.

        Args:
            run_dir: Of the run.
            options: More of the command line.
            is_launched: Whether rank 0 starts the other rank, by Lightning's own launcher.
            variables: More of the environment.
            broken: As for the server.
        """
        self.logs = self.folder / "logs"
        self.logs.mkdir(exist_ok=True)
        for log in self.logs.iterdir():
            log.unlink()
        arguments = [*self.fixed, f"--run_dir={run_dir}", *options]
        if not is_launched:
            return self.server.start_ranks(self.num_ranks, arguments, self.logs, variables, broken)
        variables = {_ARGUMENTS: json.dumps(arguments), **(variables or {})}
        broken = (*broken, "rank_runs.fork_instead_of_importing")
        return [self.server.start(arguments, self.logs / "rank-0.txt", variables, broken)]

    def run(self, run_dir: Path, *options: str, **settings) -> list[int]:
        """Run a fit to its end; returns the exit codes."""
        return [
            self.server.wait(process, 120) for process in self.start(run_dir, *options, **settings)
        ]

    def said(self) -> str:
        """Return what the processes have printed."""
        return "\n".join(path.read_text() for path in sorted(self.logs.iterdir()))


def fork_instead_of_importing() -> None:
    """Let Lightning's launcher fork the other rank, which needs no imports then."""
    from lightning.fabric.strategies.launchers import subprocess_script as fabric
    from lightning.pytorch.strategies.launchers import subprocess_script as pytorch

    import main

    class Fork:
        def __init__(self, command, env, cwd=None):
            self.returncode = None
            self.args = command
            self.pid = os.fork()
            if self.pid == 0:
                os.environ.clear()
                os.environ.update(env)
                arguments = json.loads(env[_ARGUMENTS])
                end_with(lambda: main.main(arguments), is_broken=True)

        def poll(self):
            if self.returncode is None:
                process, status = os.waitpid(self.pid, os.WNOHANG)
                if process:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

        def wait(self, timeout=None):
            while self.poll() is None:
                time.sleep(0.01)
            return self.returncode

        def send_signal(self, number):
            if self.poll() is None:
                os.kill(self.pid, number)

    pytorch.subprocess = fabric.subprocess = SimpleNamespace(Popen=Fork)


def orphans_end_soon() -> None:
    """Let a rank follow the one that has started it after one second, not ten."""
    from segalign import hang_watcher

    hang_watcher._ORPHAN_SECONDS = 1.0


def family(processes: list[int]) -> list[psutil.Process]:
    """List processes and all that they have started."""
    heads = [psutil.Process(process) for process in processes]
    return heads + [child for head in heads for child in head.children(recursive=True)]


def lives(process: psutil.Process) -> bool:
    """Say whether a process is neither gone nor dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def num_batches(run_dir: Path, rank: int) -> int:
    """Count the batches that a rank has recorded."""
    path = run_dir / f"losses-{rank}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same_ranks(broken: Path, straight: Path, missing_rows: int = 0) -> None:
    """Compare the losses of all ranks, what was logged, and the bytes of the last checkpoint.

    A step is logged after its checkpoint: its row is missing if the end came in between, which the
    caller allows so many times.
    """
    for rank in range(len(list(straight.glob("losses-*.jsonl")))):
        assert rank_losses(broken, rank) == rank_losses(straight, rank), f"losses differ: {rank}"
    for name in ("model", "ema", "optimizer"):
        one, other = (newest_checkpoint(run) / f"{name}.safetensors" for run in (broken, straight))
        assert one.read_bytes() == other.read_bytes(), name
    rows, wanted = (
        (run / "logs" / "metrics.csv").read_text().split() for run in (broken, straight)
    )
    assert [row for row in wanted if row in rows] == rows, "rows differ"
    missing = [row for row in wanted if row not in rows]
    assert len(wanted) - len(rows) <= missing_rows, f"rows are missing: {missing}"


def rank_losses(run_dir: Path, rank: int) -> dict[int, str]:
    """Read the losses of a rank; a batch that was repeated must have repeated its loss."""
    records: dict[int, str] = {}
    for line in (run_dir / f"losses-{rank}.jsonl").read_text().splitlines():
        record = json.loads(line)
        first = records.setdefault(record["batch"], record["loss"])
        assert first == record["loss"], f"losses differ: {first}, {record}"
    return records
