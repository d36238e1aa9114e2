"""The parser of runs, for configs that are to be run later."""

import argparse
import difflib
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from lightning_modules.class_paths import permitted_classes
from lightning_modules.cli import RunParts, SegalignCLI
from lightning_modules.config_checks import check_config_files
from lightning_modules.known_noise import without_known_noise
from lightning_modules.remembering_parser import Memory, RememberingParser, remembering
from lightning_modules.resume_checks import check_end
from lightning_modules.short_usage_parser import LayeredConfigFile, ShortUsageParser
from segalign.errors import ConfigError

_INLINE = "{"
_UNKNOWN_ARGUMENT = re.compile(r"Option '([^']*)' is not accepted")


class ConfigResolver:
    """Resolve command lines of runs as a run itself would; nothing is built, seeded or written.

    Parts of configs that are the same in many runs are checked once.

    Args:
        parts: What every run has besides its model and data.
        allow_import: Packages besides the usual ones whose classes configs may name.
        remembers: Whether equal parts are checked once, or each time.
    """

    def __init__(
        self, parts: RunParts, allow_import: Sequence[str] = (), *, remembers: bool = True
    ) -> None:
        self._allow_import = tuple(allow_import)
        self._memory: Memory = OrderedDict()
        self._remembers = remembers
        with permitted_classes(self._allow_import), without_known_noise():
            self._cli = _ParserOnly(parts)

    def __call__(self, stage: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the config that ``main.py STAGE ARGUMENTS`` would run, plain data.

        Args:
            stage: Such as ``fit``.
            arguments: The rest of its command line. ``--config`` takes a file, or its content on
                one line.

        Raises:
            ConfigError: If the run would refuse it for its config alone.
        """
        memory = self._memory if self._remembers else OrderedDict()
        with permitted_classes(self._allow_import), without_known_noise(), remembering(memory):
            try:
                return self._cli.resolve(stage, arguments)
            except ConfigError as error:
                line = str(error).removeprefix("`config`: ")
                raise ConfigError(line + self._suggest(line, stage, arguments)) from error
            except (OmegaConfBaseException, argparse.ArgumentError) as error:
                raise ConfigError(" ".join(str(error).split())) from error

    def _suggest(self, message: str, stage: str, arguments: Sequence[str]) -> str:
        """Suggest what a misspelt argument of a class was meant to be.

        Candidates are the arguments of all classes that the config files alone name.
        """
        unknown = _UNKNOWN_ARGUMENT.search(message)
        if unknown is None:
            return ""
        files = [one for one in arguments if not one.startswith(f"--config={_INLINE}")]
        try:
            names = set(_names(self._cli.resolve(stage, files)))
        except (ConfigError, OmegaConfBaseException, argparse.ArgumentError):
            return ""
        close = difflib.get_close_matches(unknown.group(1), sorted(names), 1)
        return f"; did you mean `{close[0]}`?" if close else ""


class _ParserOnly(SegalignCLI):
    """The command line of runs, which stops after parsing."""

    def __init__(self, parts: RunParts) -> None:
        self._checked: set[tuple[Path, int, int]] = set()
        super().__init__(parts, [], command=[], sources=[])

    def resolve(self, stage: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Parse a command line."""
        self.subcommand = stage
        self.sources = _config_files(arguments)
        parser = self._parser(stage)
        assert isinstance(parser, ShortUsageParser)
        self._check_files(parser)
        config = self._parse(stage, parser, arguments)
        # It has been validated just now, which is half of the time that writing it would take.
        text = parser.dump(config, format="yaml", skip_unset=False, skip_validation=True)
        content = dict(_SafeLoader(text).get_single_data())
        if stage == "fit" and not content["trainer"].get("fast_dev_run"):
            check_end(content["trainer"])
        return content

    def _check_files(self, parser: ShortUsageParser) -> None:
        """Check config files as a run does; each once, until it changes."""
        stats = {path: path.stat() for path in self.sources}
        states = {path: (path, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}
        new = [path for path, state in states.items() if state not in self._checked]
        check_config_files(new, parser.link_targets)
        self._checked.update(states[path] for path in new)

    def _parse(
        self, stage: str, parser: LightningArgumentParser, arguments: Sequence[str]
    ) -> Namespace:
        """Parse with the stage's own parser, a third faster than through the one above it.

        If that fails, the one above says why in the words of the real command.
        """
        try:
            return parser.parse_args(list(arguments))
        except (ConfigError, OmegaConfBaseException, argparse.ArgumentError):
            super().parse_arguments(self.parser, [stage, *arguments])
            found: Namespace = self.config[stage]
            return found

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = RememberingParser(**kwargs)
        parser.add_argument("-c", "--config", action=LayeredConfigFile)
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Do nothing yet: there is no command line."""
        self.config = {"subcommand": None}

    @override
    def _set_seed(self) -> None:
        """Do nothing: no run begins."""

    @override
    def before_instantiate_classes(self) -> None:
        """Do nothing: no run directory is made."""

    @override
    def instantiate_classes(self) -> None:
        """Do nothing: nothing is built."""


def _names(value: Any) -> Iterator[str]:
    """List all keys of a config, at any depth."""
    if isinstance(value, Mapping):
        yield from map(str, value)
    children = value.values() if isinstance(value, Mapping) else value
    for child in children if isinstance(value, Mapping | list) else ():
        yield from _names(child)


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _config_files(arguments: Sequence[str]) -> list[Path]:
    """List the config files of a command line, which may also hold configs on one line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    named = parser.parse_known_args(list(arguments))[0].config
    paths = [Path(name) for name in named if not name.startswith(_INLINE)]
    return [path for path in paths if path.is_file()]
