"""Checks on config files that the parser does not make."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import InterpolationKeyError

from segalign.errors import ConfigError
from segalign.yaml_errors import check_size, yaml_errors


def check_config_files(paths: Sequence[Path], link_targets: Sequence[str]) -> None:
    """Refuse settings that the parser would drop without a word.

    Args:
        paths: Config files, already known to be readable.
        link_targets: Keys that are computed from others.

    Raises:
        ConfigError: If a file has a ``config`` key, which would reset what its siblings set, or
            sets a key that is computed.
    """
    for path in paths:
        content = _read(path)
        if "config" in content:
            raise ConfigError(
                f"expected no `config` key in `{path}`, which would reset its other settings; "
                "layer files with several `--config` options instead."
            )
        for target in link_targets:
            if _has_key(content, target.split(".")):
                raise ConfigError(
                    f"expected `{target}` not to be set, because it is computed; "
                    f"`{path}` sets it. Remove it there."
                )


def explain_interpolation(error: InterpolationKeyError) -> str:
    """Say in one line which setting refers to what does not exist."""
    setting = str(error.full_key).partition(".")[2]
    named = re.search(r"Interpolation key '\.*([^']*)'", str(error))
    missing = named.group(1) if named else "its reference"
    return (
        f"expected `{missing}` to exist, because `{setting}` refers to it; the config has no such "
        "key. Define it, for instance under `vars`, or correct the reference."
    )


def locate_key(paths: Sequence[Path], key: str) -> Path | None:
    """Find the last config file that sets a dotted key."""
    return next((p for p in reversed(paths) if _has_key(_read(p), key.split("."))), None)


def _read(path: Path) -> Mapping[str, Any]:
    with yaml_errors(path):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    check_size(content, path)
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"expected settings in `{path}`, such as `trainer: {{max_steps: 10}}`; "
            f"got {'nothing' if content is None else type(content).__name__}. Correct the file."
        )
    return content


def _has_key(content: Any, key: Sequence[str]) -> bool:
    for part in key:
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True
