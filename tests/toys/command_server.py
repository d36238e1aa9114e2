"""Run ``main.py`` commands in forked processes, which inherit the costly imports.

Reads one JSON list of arguments per line; answers the child's process id, then its exit code
(negative: the signal that ended it).
"""

import json
import os
import sys


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def serve() -> None:
    import toy_house  # noqa: F401

    import main
    from callbacks import checkpoint, progress, run_config, run_loggers, step_rng  # noqa: F401
    from datamodules import long_caption  # noqa: F401
    from lightning_modules import cli, long_text_diffusion, reward_finetuning  # noqa: F401
    from segalign.rewards import zoo  # noqa: F401

    for line in sys.stdin:
        arguments, log = json.loads(line)
        child = os.fork()
        if child == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os._exit(main.main(arguments))
        answer(child)
        answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    serve()
