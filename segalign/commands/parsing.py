"""How light commands read their arguments."""

from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from segalign.errors import ConfigError


def parse_arguments(
    parser: ArgumentParser, argv: Sequence[str], subcommands: Sequence[str]
) -> Namespace:
    """Parse a command line.

    Args:
        parser: The command's parser, made with ``exit_on_error=False``.
        argv: Arguments after the command.
        subcommands: Names of its sub-commands, of which one must be given.

    Raises:
        ConfigError: If the arguments do not fit.
    """
    if not argv:
        raise ConfigError(
            f"expected a sub-command of `{parser.prog}`, one of {', '.join(subcommands)}; got none "
            f"(see `python {parser.prog} --help`)"
        )
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ConfigError(f"{error} (see `python {parser.prog} ... --help`)") from error


def parse_options(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse the command line of a command without sub-commands.

    Args:
        parser: The command's parser, made with ``exit_on_error=False``.
        argv: Arguments after the command.

    Raises:
        ConfigError: If the arguments do not fit.
    """
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ConfigError(f"{error} (see `python {parser.prog} --help`)") from error
