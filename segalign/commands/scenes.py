"""``main.py scenes``: keep the weights of the tiny base."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from segalign.commands.parsing import parse_arguments

DESCRIPTION = "Write the tiny base's weights, compact and with their provenance."


def build_parser() -> ArgumentParser:
    """Describe the command."""
    parser = ArgumentParser(prog="main.py scenes", description=DESCRIPTION, exit_on_error=False)
    pack = ArgumentParser(description=DESCRIPTION, exit_on_error=False)
    pack.add_argument(
        "--scorer", type=str, required=True, help="Run of configs/scenes/scorer.yaml."
    )
    pack.add_argument(
        "--generator", type=str, required=True, help="Run of configs/scenes/generator.yaml."
    )
    pack.add_argument("--output", type=str, help="Folder; the package's own if it is not given.")
    commands = parser.add_subcommands()
    commands.add_subcommand("pack-base", pack)
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse_arguments(build_parser(), argv, ["pack-base"])["pack-base"]
    from segalign.scenes.shipping import pack_base
    from segalign.scenes.weights import shipped_folder

    folder = Path(options.output) if options.output else shipped_folder()
    print(pack_base(Path(options.scorer), Path(options.generator), folder))
    return 0
