"""What a number depends on besides images and captions, so that unlike numbers never meet.

A protocol is plain JSON data: the metric and its settings, the extractor's own protocol (network,
layer, digest of the weights, resize, dtype), how many images, the grid. Versions of libraries are
in it where their code makes the number, as a network's does; sums and distances are made here.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from segalign.errors import DataError

_ABSENT: Final = "nothing"


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    """Digest a protocol, SHA-256 in hexadecimal; the order of its fields does not matter."""
    text = json.dumps(protocol, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_protocol(first: Mapping[str, Any], second: Mapping[str, Any], what: str) -> None:
    """Refuse to mix what was made by different protocols.

    Args:
        first: A protocol.
        second: Another.
        what: What would be mixed, in a few words, such as ``reference statistics and images``.

    Raises:
        DataError: If they differ; it names the first field that does, and both values.
    """
    ours, others = _leaves(first), _leaves(second)
    for name in [*ours, *(name for name in others if name not in ours)]:
        one, other = ours.get(name, _ABSENT), others.get(name, _ABSENT)
        if one != other:
            raise DataError(
                f"expected one protocol for {what}; `{name}` is {one} in one and {other} in the "
                "other; make both with the same settings"
            )


def weight_notes(name: str, network: Mapping[str, Any]) -> list[str]:
    """Say it where a network's weights are not the published ones, whose numbers others report.

    Args:
        name: Of the metric.
        network: Protocol of its network; ``verified`` is false for such weights.
    """
    if network.get("verified", True):
        return []
    return [f"{name}: the weights of {network['name']} are not the published ones"]


def _leaves(protocol: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a protocol to dotted names and values as JSON, which tells 1 from "1"."""
    leaves: dict[str, str] = {}
    for key, value in protocol.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{name}.")
        else:
            leaves[name] = json.dumps(value, sort_keys=True, allow_nan=False)
    return leaves
