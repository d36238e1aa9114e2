"""Real processes of the toy program, and what is left of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import toy_program

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, toy_program.__file__)


def start(*arguments, log=subprocess.DEVNULL, **environment):
    """Start the toy program in a session of its own."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=variables,
        start_new_session=True,
    )


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def processes_of(folder):
    """List living processes whose command line names a folder, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            is_one = any(str(folder) in word for word in process.cmdline())
            if is_one and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def events(run_dir):
    path = run_dir / "events"
    return path.read_text().splitlines() if path.exists() else []


def kill_left(folder):
    """End what a failed test has left."""
    for process in processes_of(folder):
        process.kill()
