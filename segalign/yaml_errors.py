"""What users are told of YAML that cannot be read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from segalign.errors import ConfigError


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
