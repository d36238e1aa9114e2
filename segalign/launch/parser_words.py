"""What the parser says about values, in the words of those who wrote them."""

import re
from typing import Final

_TYPES: Final = {
    "float": "a number (float)",
    "int": "an integer (int)",
    "bool": "true or false (bool)",
    "str": "text (str)",
    "list": "a list",
    "dict": "a mapping",
    "Sequence": "a list",
    "Mapping": "a mapping",
    "PositiveInt": "an integer above 0",
    "NonNegativeInt": "an integer from 0 on",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0 on",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number between 0 and 1",
}
_CLASS: Final = re.compile(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>")
_RESTRICTED: Final = re.compile(
    r"Not of type (\w+): (?:invalid literal for int\(\) with base 10"
    r"|could not convert string to float): ('[^']*')"
)
_OTHERS: Final = re.compile(r"Not of type (\w+):")
_LITERAL: Final = re.compile(r"Expected a typing\.Literal\[([^\]]*)\]")
_GOT: Final = re.compile(r"(?:[.;] Got value|; Given value): ")


def plain_words(message: str) -> str:
    """Rewrite what names types as Python does; anything else stays as the parser says it."""
    message = _CLASS.sub(lambda found: f"expected {_name(found[1])}", message)
    message = _RESTRICTED.sub(lambda found: f"expected {_name(found[1])}; got {found[2]}", message)
    message = _OTHERS.sub(lambda found: f"expected {_name(found[1])}:", message)
    message = _LITERAL.sub(lambda found: f"expected one of {found[1]}", message)
    return _GOT.sub("; got ", message)


def _name(kind: str) -> str:
    return _TYPES.get(kind, kind)
