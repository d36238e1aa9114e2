"""Nested state as JSON plus named tensors, without pickle.

A tree of dicts, lists, tuples, numbers, strings, ``None`` and tensors becomes a JSON document in
which every tensor is replaced by its name. Dicts with string keys stay plain JSON objects; what
JSON cannot say is wrapped in an object with one key that starts with ``$``.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segalign.errors import DataError

TreePath = tuple[str | int, ...]
NamedTensors = dict[str, dict[str, Tensor]]

# Where tensors go: (path prefix in the tree, file stem). Others go to "extra".
_FILES: tuple[tuple[TreePath, str], ...] = (
    (("state_dict",), "model"),
    (("optimizer_states",), "optimizer"),
    (("ema", "weights"), "ema"),
)
_TAGS = frozenset({"$tensor", "$tuple", "$dict", "$float", "$counter"})


def encode_tree(tree: Any) -> tuple[Any, NamedTensors]:
    """Separate a tree into a JSON document and its tensors.

    Args:
        tree: Nested dict, list and tuple of ``None``, bool, int, float, str and tensors; dict keys
            are strings or integers.

    Returns:
        The document, and the tensors by file stem and name.

    Raises:
        TypeError: If a value or key is of another type; the message names its path in the tree.
    """
    tensors: NamedTensors = {}
    return _encode(tree, (), tensors), tensors


def decode_tree(document: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Rebuild the tree that ``encode_tree`` took apart.

    Args:
        document: The JSON document; it may come from anywhere.
        tensors: The tensors by file stem and name.

    Raises:
        DataError: If the document is none of ``encode_tree``, or a tensor is missing.
    """
    try:
        return _decode(document, tensors)
    except KeyError as error:
        raise _foreign(f"no tensor {error}") from error
    except RecursionError as error:
        raise _foreign("nesting that is too deep") from error
    except (TypeError, ValueError) as error:
        raise _foreign(f"{error}") from error


def _foreign(found: str) -> DataError:
    return DataError(
        f"expected state as a run stores it in a checkpoint; got {found:.200}; "
        "choose another checkpoint"
    )


def _decode(document: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    if isinstance(document, list):
        return [_decode(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if len(document) == 1 and tag.startswith("$"):
        return _decode_tagged(tag, document[tag], tensors)
    return {key: _decode(value, tensors) for key, value in document.items()}


def _decode_tagged(tag: str, value: Any, tensors: Mapping[str, Mapping[str, Tensor]]) -> Any:
    if tag not in _TAGS:
        raise ValueError(f"unknown tag `{tag}`")
    if tag == "$tensor":
        stem, name = value
        return tensors[stem][name]
    if tag == "$float":
        return float(value)
    items = [_decode(item, tensors) for item in value]
    if tag == "$tuple":
        return tuple(items)
    return Counter(dict(items)) if tag == "$counter" else dict(items)


def _encode(value: Any, path: TreePath, tensors: NamedTensors) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        return {"$tensor": list(_place_tensor(value, path, tensors))}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if type(value) in (list, tuple):
        items = [_encode(item, (*path, index), tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise TypeError(
        "expected None, bool, int, float, str, Tensor, dict, list or tuple at "
        f"`{_spell(path)}`; got {type(value).__module__}.{type(value).__qualname__}. "
        "Keep it out of the checkpoint, or store plain numbers and tensors in its place."
    )


def _encode_mapping(value: Mapping[Any, Any], path: TreePath, tensors: NamedTensors) -> Any:
    for key in value:
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise TypeError(
                f"expected str or int keys at `{_spell(path)}`; got {key!r}. "
                "Keep it out of the checkpoint, or use plain keys."
            )
    items = {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
    if isinstance(value, Counter):
        return {"$counter": [list(item) for item in items.items()]}
    if all(isinstance(key, str) and not key.startswith("$") for key in items):
        return items
    return {"$dict": [list(item) for item in items.items()]}


def _place_tensor(tensor: Tensor, path: TreePath, tensors: NamedTensors) -> tuple[str, str]:
    stem, depth = "extra", 0
    for prefix, file_stem in _FILES:
        if path[: len(prefix)] == prefix:
            stem, depth = file_stem, len(prefix)
    name = ".".join(str(part) for part in path[depth:]) or "tensor"
    named = tensors.setdefault(stem, {})
    if name in named:
        raise TypeError(
            f"expected one tensor named `{name}` at `{_spell(path)}`; got two. "
            "Rename one of the keys that join to this name."
        )
    named[name] = tensor
    return stem, name


def _spell(path: TreePath) -> str:
    return ".".join(str(part) for part in path) or "<root>"
