"""How light commands read their arguments."""

import re
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from segalign.errors import ConfigError

# Lines of jsonargparse's explanations that say nothing about the user's mistake.
_NOISE = re.compile(
    r"(- )?(Does not validate against any of the Union subtypes|Subtypes: |Errors:"
    r"|Expected a <class 'NoneType'>|Expected a path but .* either not accessible"
    r"|Expected a dot import path string|Given value type: |Given value: (NestedArg|\{))"
)
_CLASS_WANTED = "Expected a dot import path string"
_KEY = re.compile(r"Parser key \"([^\"]*)\":")
_SEE = re.compile(r"\s*\(see `[^`]*`\)")
_DENIED = re.compile(r"Importing '([^']*)' is not allowed, denied by the '([^']*)' entry .*")
_REQUIRED = re.compile(r"[^ ,]*\.(?=[^. ,]+(?:,|$))")


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
        name = argv[0] if argv[0] in subcommands else ""
        raise _explained(error, f"{parser.prog} {name}".rstrip()) from error


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
        raise _explained(error, parser.prog) from error


def add_run_options(parser: ArgumentParser) -> None:
    """Add the options of commands that open a run."""
    parser.add_argument(
        "--weights", choices=["raw", "ema"], help="default: the moving average if there is one"
    )
    parser.add_argument(
        "--allow_import",
        type=str,
        action="append",
        default=[],
        help="package whose classes the run's config may name too",
    )


def _explained(error: ArgumentError, program: str) -> ConfigError:
    """Put an error of the parser on one line."""
    line = summarise(str(error))
    if "are required: " in line:
        before, found, names = line.partition("are required: ")
        line = before + found + _REQUIRED.sub("", names)
    return ConfigError(f"{line} (see `python {program} --help`)")


def summarise(message: str) -> str:
    """Reduce jsonargparse's nested explanation to one line about the mistake itself."""
    parts: list[str] = []
    for line in message.splitlines():
        text = _SEE.sub("", line.strip())
        if not text or _NOISE.match(text):
            continue
        text = _KEY.sub(r"`\1`:", text.removeprefix("- "))
        text = _DENIED.sub(_explain_denied, text)
        given = text.removeprefix("Given value: ")
        if given != text and _CLASS_WANTED in message:
            text = f"expected a class path `package.module.Class`, or settings; got `{given}`"
        shown = re.compile(rf"(?<![\w>=.]){re.escape(given)}(?!\w)")
        if not any(shown.search(part) for part in parts):
            parts.append(text)
    return " ".join(part if part.endswith((":", ";")) else f"{part};" for part in parts).rstrip(";")


def _explain_denied(denied: re.Match[str]) -> str:
    path, entry = denied.groups()
    package = path.partition(".")[0]
    if entry.partition(".")[0] in sys.stdlib_module_names:
        return f"configs may not name `{path}`, which could run any code"
    return (
        f"configs may not name `{path}`. If you trust the package, "
        f"add `--allow_import {package}` to the command line"
    )
