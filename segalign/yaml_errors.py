"""What users are told of YAML that cannot be read."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from segalign.errors import ConfigError

_MAX_VALUES: Final = 1_000_000


@contextlib.contextmanager
def yaml_errors(path: Path) -> Iterator[None]:
    """Turn an error of YAML or of its encoding into a one-line ``ConfigError`` naming the file."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(
            f"expected YAML in `{path}`{line}; got: {error.problem}. Correct the file."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"expected UTF-8 YAML in `{path}`; got: {error}. Correct the file."
        ) from error
    except RecursionError as error:
        raise _unusable(path, "nesting that is too deep") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # What PyYAML lets through of a value that is not of its tag, such as `!!int x`.
        raise _unusable(path, f"a value that is not what its tag says ({error})") from error


def check_size(content: Any, path: Path) -> None:
    """Refuse content whose aliases contain themselves, or make little text into very much.

    Raises:
        ConfigError: If they do.
    """
    try:
        size = _expanded_size(content, {}, set())
    except RecursionError as error:
        raise _unusable(path, "nesting that is too deep") from error
    if size > _MAX_VALUES:
        raise _unusable(path, f"more than {_MAX_VALUES:,} values or an alias that holds itself")


def _expanded_size(value: Any, known: dict[int, float], inside: set[int]) -> float:
    """Count the values in one, those behind aliases each time; infinite if it holds itself."""
    if not isinstance(value, list | dict):
        return 1
    place = id(value)
    if place in inside:
        return math.inf
    if place not in known:
        inside.add(place)
        parts = value if isinstance(value, list) else [*value, *value.values()]
        known[place] = 1 + sum(_expanded_size(part, known, inside) for part in parts)
        inside.remove(place)
    return known[place]


def _unusable(path: Path, found: str) -> ConfigError:
    return ConfigError(f"expected plain YAML in `{path}`; got {found:.200}. Correct the file.")
