"""Run ``main.py`` commands in forked processes, which inherit the costly imports.

Reads one JSON object per line and answers one number: to ``{"start": arguments, ...}`` the child's
process id, to ``{"wait": process id, "seconds": at most}`` its exit code (negative: the signal that
ended it).
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

NEVER_ENDED = 1000
BUG = 99  # what a process that was broken in the wrong way ends with; see `end_with`


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def wait(child: int, seconds: float) -> int:
    """Wait for a child; one that takes longer is killed, and ``NEVER_ENDED`` is its exit code."""
    deadline = time.monotonic() + seconds
    while True:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return NEVER_ENDED
        time.sleep(0.005)


def serve() -> None:
    import toy_house  # noqa: F401

    import main  # noqa: F401
    from callbacks import (  # noqa: F401
        checkpoint,
        hang_watch,
        non_finite,
        preemption,
        progress,
        run_config,
        run_loggers,
        step_rng,
    )
    from datamodules import long_caption  # noqa: F401
    from lightning_modules import (  # noqa: F401
        cli,
        long_text_diffusion,
        reward_finetuning,
        scenes_scorer,
    )
    from segalign.rewards import zoo  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer(wait(order["wait"], order["seconds"]))
            continue
        child = os.fork()
        if child == 0:
            obey(order)
        answer(child)


def obey(order: dict[str, Any]) -> None:
    """Be the child: take its environment and output, break what shall be broken, and run."""
    import main

    descriptor = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(order["variables"])
    # A shell's background commands begin with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def command() -> int:
        for name in order["broken"]:
            module, _, function = name.rpartition(".")
            getattr(importlib.import_module(module), function)()
        return main.main(order["start"])

    end_with(command, is_broken=bool(order["broken"]))


def end_with(command: Callable[[], int], *, is_broken: bool) -> NoReturn:
    """Run a command and end this process with its exit code.

    Of a process that was broken on purpose, an error as from a slip in the code gives ``BUG``: a
    variant that raises such an error would be caught by every test, and show nothing.
    """
    code = 1
    try:
        code = command()
    except (TypeError, AttributeError, NameError, ImportError):
        traceback.print_exc()
        code = BUG if is_broken else 1
    except BaseException:  # noqa: BLE001 - os._exit would hide it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
