"""A process that runs ``main.py`` commands for tests, each in a fork of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from command_server import BUG

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    """Find a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class CommandServer:
    """Starts ``main.py`` commands in real processes without importing the stack each time.

    Args:
        variables: More of their environment.
    """

    def __init__(self, **variables: str):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), f"{REPOSITORY}/tests/toys"])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import command_server; command_server.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
        self.last = 0
        self._logs: dict[int, Path] = {}

    def start(
        self,
        arguments: list[str],
        log: Path,
        variables: dict[str, str] | None = None,
        broken: tuple[str, ...] = (),
    ) -> int:
        """Start a command; several may run at a time.

        Args:
            arguments: After ``main.py``.
            log: What it prints is appended here.
            variables: More of its environment, such as its rank.
            broken: Functions, as ``module.function``, that break something before it runs.

        Returns:
            Its process id.
        """
        order = {"start": arguments, "log": str(log), "variables": variables or {}}
        self.last = self._ask({**order, "broken": broken})
        self._logs[self.last] = log
        return self.last

    def wait(self, process: int | None = None, seconds: float = 300.0) -> int:
        """Wait for a command, else for the one started last.

        Returns:
            Its exit code; ``NEVER_ENDED`` if it had to be killed after so many seconds.

        Raises:
            RuntimeError: If what should break something does not fit the code that it breaks.
        """
        process = self.last if process is None else process
        code = self._ask({"wait": process, "seconds": seconds})
        if code == BUG:
            tail = self._logs[process].read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the variant itself is broken: {tail}")
        return code

    def start_ranks(
        self,
        num_ranks: int,
        arguments: list[str],
        folder: Path,
        variables: dict[str, str] | None = None,
        broken: tuple[str, ...] = (),
    ) -> list[int]:
        """Start a command once for each rank, as ``srun`` does; ``folder/rank-0.txt`` is a log.

        The command's config has to say ``trainer.devices`` and a strategy.

        Returns:
            The process ids, in rank order.
        """
        shared = {
            "WORLD_SIZE": str(num_ranks),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **(variables or {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        return [
            self.start(
                arguments, folder / f"rank-{rank}.txt", {**shared, "LOCAL_RANK": str(rank)}, broken
            )
            for rank in range(num_ranks)
        ]

    def _ask(self, order: dict) -> int:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
