"""Entry point of every command; ``python main.py --help`` lists them."""

import importlib
import sys
from collections.abc import Sequence
from functools import partial

from segalign.error_boundary import run_guarded
from segalign.errors import ConfigError

USAGE = """usage: python main.py COMMAND [options]     (help on one: python main.py COMMAND --help)

train and evaluate; configs are layered left to right, `--key.subkey VALUE` overrides them:
  fit       --config FILE [--config FILE ...] [--ckpt_path auto|RUN|CHECKPOINT] [--run_dir DIR]
  validate  --config FILE --ckpt_path auto|RUN|CHECKPOINT
  test      --config FILE --ckpt_path auto|RUN|CHECKPOINT
  predict   --config FILE --ckpt_path auto|RUN|CHECKPOINT

data:
  shards    pack, index or verify WebDataset shards
  scenes    keep the weights of the tiny base of the embedded benchmark

SEGALIGN_DEBUG=1 in the environment shows the traceback of every error.
"""
# Commands that start at once, because they import neither Lightning nor, before they must, torch.
LIGHT_COMMANDS = {
    "scenes": "segalign.commands.scenes",
    "shards": "segalign.commands.shards",
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
    if command in LIGHTNING_COMMANDS:
        return run_lightning(arguments)
    known = ", ".join([*LIGHTNING_COMMANDS, *LIGHT_COMMANDS])
    raise ConfigError(f"expected a command, one of {known}; got `{command}`.")


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
