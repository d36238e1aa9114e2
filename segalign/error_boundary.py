"""What a command prints and returns when it fails."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator

from segalign.errors import ConfigError, SegalignError, StoppedError

DEBUG_VARIABLE = "SEGALIGN_DEBUG"
# How PyTorch hands on an error of another process: its message is the whole traceback.
_HANDED_ON = re.compile(r"Caught (\w+) in .*\nOriginal Traceback ")


def run_guarded(command: Callable[[], int]) -> int:
    """Run a command; an error meant for the user becomes one line and an exit code.

    Other errors keep their traceback, and all do if the environment has ``SEGALIGN_DEBUG=1``.
    """
    try:
        return command()
    except Exception as error:
        known = find_user_error(error)
        if known is None or os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        word = "stopped" if isinstance(known, StoppedError) else "error"
        sys.stderr.write(f"{word}: {' '.join(original_message(known).split())}\n")
        return exit_code(known)


def find_user_error(error: BaseException) -> BaseException | None:
    """Find, among an error and its causes, the first whose message tells the user what to do."""
    return next((cause for cause in _causes(error) if _is_user_error(cause)), None)


def original_message(error: BaseException) -> str:
    """Return an error's message, without the traceback of the worker process that raised it."""
    message = str(error)
    handed_on = _HANDED_ON.match(message)
    if handed_on is None:
        return message
    raised = re.compile(rf"^(?:\w+\.)*{handed_on.group(1)}: ", re.MULTILINE)
    return raised.split(message)[-1]


def exit_code(error: BaseException) -> int:
    """Return the exit code of a user error; a config that does not parse counts as a bad one."""
    return error.exit_code if isinstance(error, SegalignError) else ConfigError.exit_code


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _is_user_error(error: BaseException) -> bool:
    # OmegaConf is recognised by name, so that light commands need not import it.
    is_omegaconf = type(error).__module__.partition(".")[0] == "omegaconf"
    return is_omegaconf or isinstance(error, SegalignError | argparse.ArgumentError)
