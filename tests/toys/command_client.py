"""A process that runs ``main.py`` commands for tests, each in a fork of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


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

    def start(self, arguments: list[str], log: Path) -> int:
        self.process.stdin.write(json.dumps([arguments, str(log)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
