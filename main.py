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
LIGHT_COMMANDS = {
    "direction": "segalign.commands.direction",
    "import": "segalign.commands.import_weights",
    "results": "segalign.commands.results",
    "scenes": "segalign.commands.scenes",
    "shards": "segalign.commands.shards",
    "stats": "segalign.commands.stats",
}
# These may need the module of a run, which `load_run` builds for them.
RUN_COMMANDS = {
    "export": "segalign.commands.export",
    "generate": "segalign.commands.generate",
}
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code of the process."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_guarded(partial(dispatch, arguments))


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
    if command in LIGHTNING_COMMANDS:
        return run_lightning(arguments)
    known = ", ".join([*LIGHTNING_COMMANDS, *RUN_COMMANDS, *LIGHT_COMMANDS])
    raise ConfigError(f"expected a command, one of {known}; got `{command}`.")


def load_run(*args: Any, **kwargs: Any) -> Any:
    """Build the module of a run; Lightning is imported only now."""
    from lightning_modules.run_loading import load_module

    return load_module(*args, **kwargs)


def run_lightning(arguments: Sequence[str]) -> int:
    """Put together what every run has, and train or evaluate."""
    from callbacks import checkpoint, image_writer, progress, run_config, run_loggers, step_rng
    from lightning_modules import cli

    parts = cli.RunParts(
        checkpoint=checkpoint.RunCheckpoint,
        checkpoint_io=checkpoint.SafetensorsCheckpointIO,
        run_config=run_config.RunConfigWriter,
        step_rng=step_rng.StepRng,
        progress_bar=progress.StepProgressBar,
        image_writer=image_writer.ImageWriter,
        loggers=run_loggers.run_loggers,
    )
    cli.run(arguments, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
