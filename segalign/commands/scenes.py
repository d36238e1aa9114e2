"""``main.py scenes``: keep the weights of the tiny base and of the scorers beside it."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from segalign.commands.parsing import parse_arguments

DESCRIPTION = "Write the tiny base's weights, compact and with their provenance."
_OUTPUT = "Folder; the package's own if it is not given."
_SCORERS = (
    ("pack-held-out", "the held-out scorer's", "held_out_scorer.yaml"),
    ("pack-preference", "the preference model's", "preference.yaml"),
)


def build_parser() -> ArgumentParser:
    """Describe the command."""
    parser = ArgumentParser(prog="main.py scenes", description=DESCRIPTION, exit_on_error=False)
    base = ArgumentParser(description=DESCRIPTION, exit_on_error=False)
    base.add_argument(
        "--scorer", type=str, required=True, help="Run of configs/scenes/scorer.yaml."
    )
    base.add_argument(
        "--generator", type=str, required=True, help="Run of configs/scenes/generator.yaml."
    )
    base.add_argument("--output", type=str, help=_OUTPUT)
    commands = parser.add_subcommands()
    commands.add_subcommand("pack-base", base)
    for name, what, recipe in _SCORERS:
        beside = ArgumentParser(
            description=f"Write {what} weights beside the tiny base's.", exit_on_error=False
        )
        beside.add_argument(
            "--scorer", type=str, required=True, help=f"Run of configs/scenes/{recipe}."
        )
        beside.add_argument("--output", type=str, help=_OUTPUT)
        commands.add_subcommand(name, beside)
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse_arguments(
        build_parser(), argv, ["pack-base", "pack-held-out", "pack-preference"]
    )
    from segalign.scenes.shipping import pack_base, pack_held_out, pack_preference
    from segalign.scenes.weights import shipped_folder

    chosen = options[options.subcommand]
    folder = Path(chosen.output) if chosen.output else shipped_folder()
    if options.subcommand == "pack-held-out":
        print(pack_held_out(Path(chosen.scorer), folder))
    elif options.subcommand == "pack-preference":
        print(pack_preference(Path(chosen.scorer), folder))
    else:
        print(pack_base(Path(chosen.scorer), Path(chosen.generator), folder))
    return 0
