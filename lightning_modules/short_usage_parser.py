"""A parser that reports an error in one line."""

import difflib
import re
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_modules.config_checks import locate_key
from segalign.commands.parsing import summarise
from segalign.errors import ConfigError

_UNKNOWN = re.compile(r"unrecognized arguments: --(\S+)|not accept option '([^']*)'")


class LayeredConfigFile(ActionConfigFile):
    """A config file whose ``vars`` add to those of earlier files instead of replacing them all."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Apply the file, then merge what it says about ``vars`` into what was said before."""
        earlier = cfg.get("vars")
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]
        if isinstance(earlier, dict):
            cfg["vars"] = merge_dicts(earlier, cfg.get("vars") or {})


def merge_dicts(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dicts; where both have a value that is no dict, the later one counts."""
    merged = dict(earlier)
    for key, value in later.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge_dicts(old, value)
        else:
            merged[key] = value
    return merged


class ShortUsageParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage of two hundred options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"exit_on_error": False, **kwargs})
        self.link_targets: list[str] = []
        self.known_keys: list[str] = []
        self.config_files: list[Path] = []

    @override
    def link_arguments(self, source: Any, target: str, *args: Any, **kwargs: Any) -> None:
        """Link as usual, and remember the target, which no config may set."""
        super().link_arguments(source, target, *args, **kwargs)
        self.link_targets.append(target)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ``ConfigError`` with the message on one line."""
        line = summarise(message)
        key = unknown_key(message)
        if key is not None:
            line += self._whereabouts(key)
        program = self.prog.replace(" [options]", "")
        raise ConfigError(f"{line} (see `python {program} --help`)") from ex

    def _whereabouts(self, key: str) -> str:
        close = difflib.get_close_matches(key, self.known_keys, 1)
        path = locate_key(self.config_files, key)
        place = "" if path is None else f" in `{path}`"
        return place + (f"; did you mean `{close[0]}`?" if close else "")


def unknown_key(message: str) -> str | None:
    """Read the dotted key that a message calls unknown."""
    unknown = _UNKNOWN.search(message)
    if unknown is None:
        return None
    return str(unknown.group(1) or unknown.group(2)).partition("=")[0]
