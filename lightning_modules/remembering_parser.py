"""A parser that checks a part of a config once, however many configs have the same part."""

import contextlib
import contextvars
import copy
import hashlib
import os
import re
from argparse import ArgumentParser
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final

from typing_extensions import override

from lightning_modules.short_usage_parser import ShortUsageParser

_NUM_REMEMBERED: Final = 4096
# `${oc.env:NAME}` and its like: what they stand for is not in the config.
_FROM_OUTSIDE: Final = re.compile(r"\$\{[^}]*:")

# What was parsed or written, and by which parser: it must live as long as its id is a key.
Memory = OrderedDict[tuple[Any, ...], tuple[ShortUsageParser, Any]]
_MEMORY: Final[contextvars.ContextVar[Memory | None]] = contextvars.ContextVar(
    "parsed parts of configs", default=None
)


@contextlib.contextmanager
def remembering(memory: Memory) -> Iterator[None]:
    """Let parsers use what they have found for the same parts, for the duration of a block."""
    token = _MEMORY.set(memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)


class RememberingParser(ShortUsageParser):
    """A parser that remembers what it, and its part for each class, found for the same input.

    A part is asked again and again for the same arguments: several times while one config is
    parsed, and once more for every config that has them. What it finds depends on the part, on
    what it is given, on the state that the parsing library keeps in context variables and on the
    working directory; all of that is the key under which it is remembered.
    """

    @override
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Read a layer of a config, or recall the same over the same layers."""
        return self._recall("layer", super().parse_string, content, *args, **kwargs)

    @override
    def parse_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Check arguments and fill in defaults, or recall the same."""
        return self._recall("parse", super().parse_object, obj, *args, **kwargs)

    @override
    def get_defaults(self, *args: Any, **kwargs: Any) -> Any:
        """Return the defaults of all arguments, or recall them."""
        return self._recall("defaults", super().get_defaults, *args, **kwargs)

    @override
    def dump(self, namespace: Any, *args: Any, **kwargs: Any) -> str:
        """Write arguments as text, or recall the same."""
        text: str = self._recall("dump", super().dump, namespace, *args, **kwargs)
        return text

    def _recall(self, kind: str, find: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        memory = _MEMORY.get()
        given = repr((args, kwargs))
        if memory is None or _FROM_OUTSIDE.search(given):
            return find(*args, **kwargs)
        key = (id(self), kind, _digest(given), _surroundings())
        if key in memory:
            memory.move_to_end(key)
            return copy.deepcopy(memory[key][1])
        found = find(*args, **kwargs)
        memory[key] = (self, copy.deepcopy(found))
        if len(memory) > _NUM_REMEMBERED:
            memory.popitem(last=False)
        return found


def _surroundings() -> bytes:
    """Describe what besides its input decides what a parser finds."""
    variables = [
        (variable.name, id(value) if isinstance(value, ArgumentParser) else repr(value))
        for variable, value in contextvars.copy_context().items()
        if variable is not _MEMORY
    ]
    return _digest(repr((sorted(variables, key=lambda one: one[0]), os.getcwd())))  # noqa: PTH109


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
