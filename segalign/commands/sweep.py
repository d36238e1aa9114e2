"""``main.py sweep``: studies, from a YAML file to tables and a report."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser


def build_parser() -> ArgumentParser:
    """Build the parser of the command's arguments."""
    return ArgumentParser(prog="main.py sweep", exit_on_error=False)


def run(argv: Sequence[str], resolve_configs: object, program: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    return 0
