"""YAML as the parser of runs reads and writes it, with mistakes that YAML itself lets pass found.

PyYAML alone takes ``1e-4`` for text, ``10:30`` for a number and the last of two equal keys.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final

import yaml

from segalign.errors import ConfigError
from segalign.yaml_errors import check_size, yaml_errors

_FLOAT: Final = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INTEGER: Final = re.compile(
    r"^(?:[-+]?0b[0-1_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$"
)
_OTHER_KINDS: Final = ("bool", "merge", "null", "value")
_NUMBER_STARTS: Final = list("-+0123456789.")


class _SafeLoader(yaml.SafeLoader):
    """Reads numbers as the parser does, times as text, and refuses a key that is there twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # the base class's own name and shape
        start: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in _OTHER_KINDS]
        for start, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Make a dict of a node."""
        seen: set[Any] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.tag.endswith(":merge"):
                continue
            if name.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key `{name.value}` is there twice", problem_mark=name.start_mark
                )
            seen.add(name.value)
        return super().construct_mapping(node, deep)


_SafeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _NUMBER_STARTS)
_SafeLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, _NUMBER_STARTS[:-1])


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes text that the parser would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write values that are one object in full, each time."""
        return True


def _text(dumper: Any, text: str) -> Any:
    """Keep text of several lines on one."""
    style = '"' if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _NUMBER_STARTS)


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file.

    Args:
        path: The file.
        what: What it is, for messages.

    Raises:
        ConfigError: If there is none, or it is no YAML.
    """
    try:
        with yaml_errors(path):
            content = _SafeLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ConfigError(
            f"expected {what} at `{path}`; got: {error.strerror}. Give the path of one."
        ) from error
    check_size(content, path)
    return content


def dump_yaml(content: Any) -> str:
    """Write a value so that the parser of runs reads the same value."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def dump_line(content: Any) -> str:
    """Write a value on one line, which the parser of runs takes in place of a config file."""
    text: str = yaml.dump(
        content,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=True,
        width=2**31 - 1,
    )
    return text.strip()
