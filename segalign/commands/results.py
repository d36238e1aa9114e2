"""``main.py results``: set results of evaluations side by side."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from segalign.commands.parsing import parse_options

DESCRIPTION = "Print a Markdown table of results, if their numbers may be compared."


def build_parser() -> ArgumentParser:
    """Describe the command."""
    parser = ArgumentParser(prog="main.py results", description=DESCRIPTION, exit_on_error=False)
    parser.add_argument(
        "files", type=str, nargs="+", help="result.json of `main.py test`, or its folder"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = parse_options(build_parser(), argv)
    from segalign.evaluation.result import EvaluationResult
    from segalign.evaluation.result_table import compare

    paths = [Path(file) for file in options.files]
    files = [path / "result.json" if path.is_dir() else path for path in paths]
    results = [EvaluationResult.load(file) for file in files]
    print(compare(results, [f"`{file}`" for file in files]).to_markdown(), end="")
    return 0
