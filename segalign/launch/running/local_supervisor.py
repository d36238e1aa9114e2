"""Supervisors that are started on this machine, one process for each run."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from segalign.atomic import make_directory, storage_errors
from segalign.errors import ConfigError
from segalign.launch.plan import PlannedRun
from segalign.launch.running.failure_reason import failure_reason
from segalign.launch.running.run_folder import SUPERVISOR_LOG, sweep_folder
from segalign.launch.running.run_processes import find_run_processes, kill_all


def supervisor_command(
    program: Sequence[str], run_dir: Path, attempt: int, options: Sequence[str] = ()
) -> list[str]:
    """Compose the command line of a run's supervisor.

    Args:
        program: Command line of ``main.py``.
        run_dir: The run directory.
        attempt: Number of the attempt that it is to make.
        options: More arguments of the run.
    """
    handed_on = [f"--attempt={attempt}", *(f"--option={option}" for option in options)]
    return [*program, "sweep", "execute", str(run_dir.absolute()), *handed_on]


@dataclass(frozen=True)
class LocalSupervisor:
    """A supervisor that this process has started.

    Attributes:
        run: What it supervises.
        process: Its process, which leads a session, so that it outlives this one.
        log: What it prints.
        log_start: Where in its log it began.
    """

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    @classmethod
    def start(
        cls, run: PlannedRun, program: Sequence[str], attempt: int, options: Sequence[str]
    ) -> "LocalSupervisor":
        """Start it.

        Raises:
            StorageError: If its log cannot be written.
            ConfigError: If there is no such program.
        """
        folder = sweep_folder(run.directory)
        make_directory(folder)
        path = folder / SUPERVISOR_LOG
        with storage_errors(path):
            log = path.open("ab")
        with log:
            start = log.seek(0, os.SEEK_END)
            command = supervisor_command(program, run.directory, attempt, options)
            return cls(run, _start(command, log), path, start)

    def reason(self, exit_code: int) -> str:
        """Say why it ended, from what it printed."""
        return failure_reason(self.log, exit_code, self.log_start)

    def stop(self) -> None:
        """Ask it to stop, and its run with it."""
        self.process.terminate()

    def kill(self) -> None:
        """Kill it and its run."""
        kill_all(find_run_processes([self.run.directory]))


def _start(command: Sequence[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    # Whoever works inside a job of a cluster would else have runs take themselves for its tasks.
    environment = {name: value for name, value in os.environ.items() if name[:6] != "SLURM_"}
    try:
        return subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    except OSError as error:
        raise ConfigError(
            f"expected to be able to start `{command[0]}`; got: {error.strerror}."
        ) from error
