"""Entry point of every command; ``python main.py --help`` lists them."""

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from segalign.commands.usage import USAGE
from segalign.error_boundary import run_guarded
from segalign.errors import ConfigError

# Commands that start at once, because they import neither Lightning nor, before they must, torch.
_LIGHT = ("direction", "results", "scenes", "shards", "stats")
LIGHT_COMMANDS = {name: f"segalign.commands.{name}" for name in _LIGHT}
LIGHT_COMMANDS["import"] = "segalign.commands.import_weights"
# These may need the module of a run, or the parser of runs; they are handed what builds it.
RUN_COMMANDS = {name: f"segalign.commands.{name}" for name in ("export", "generate")}
STUDY_COMMANDS = {"sweep": "segalign.commands.sweep"}
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code of the process."""
    return run_guarded(partial(dispatch, sys.argv[1:] if argv is None else list(argv)))


def dispatch(arguments: Sequence[str]) -> int:
    """Choose the command by the first argument."""
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command in LIGHT_COMMANDS:
        module = importlib.import_module(LIGHT_COMMANDS[command])
        return int(module.run(arguments[1:]) or 0)
    if command in RUN_COMMANDS:
        module = importlib.import_module(RUN_COMMANDS[command])
        return int(module.run(arguments[1:], load_run=load_run) or 0)
    if command in STUDY_COMMANDS:
        module = importlib.import_module(STUDY_COMMANDS[command])
        return int(module.run(arguments[1:], resolve_configs, (sys.executable, __file__)) or 0)
    if command in LIGHTNING_COMMANDS:
        return run_lightning(arguments)
    known = (*LIGHTNING_COMMANDS, *RUN_COMMANDS, *STUDY_COMMANDS, *LIGHT_COMMANDS)
    raise ConfigError(f"expected a command, one of {', '.join(known)}; got `{command}`.")


def load_run(*args: Any, **kwargs: Any) -> Any:
    """Build the module of a run; Lightning is imported only now."""
    from lightning_modules.run_loading import load_module

    return load_module(*args, **kwargs)


def resolve_configs(allow_import: Sequence[str]) -> Any:
    """Open the parser of runs for configs that are to be run later."""
    from lightning_modules.config_resolver import ConfigResolver

    return ConfigResolver(run_parts(), allow_import)


def run_lightning(arguments: Sequence[str]) -> int:
    """Train or evaluate."""
    from lightning_modules import cli

    cli.run(arguments, run_parts())
    return 0


def run_parts() -> Any:
    """Put together what every run has."""
    from callbacks.run_parts import run_parts
    from lightning_modules.cli import RunParts

    return RunParts(**run_parts())


if __name__ == "__main__":
    sys.exit(main())
