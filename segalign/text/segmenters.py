"""Describe splitting strategies as JSON, and build them from such descriptions."""

from collections.abc import Mapping
from typing import Any

from segalign.errors import ConfigError
from segalign.text.clauses import ClauseSegmenter
from segalign.text.segmenter import OfficialSegmenter, Segmenter, SentenceSegmenter
from segalign.text.windows import WindowSegmenter

_CLASSES: Mapping[str, type[Any]] = {
    "sentence": SentenceSegmenter,
    "official": OfficialSegmenter,
    "clause": ClauseSegmenter,
    "window": WindowSegmenter,
}
_SETTINGS: Mapping[str, tuple[str, ...]] = {"clause": ("min_words",), "window": ("num_tokens",)}


def describe_segmenter(segmenter: Segmenter) -> dict[str, Any]:
    """Describe a splitting strategy.

    Returns:
        ``{"name": ...}`` and its settings, which :func:`build_segmenter` understands; JSON.

    Raises:
        ConfigError: If its class is not one of this package (subclasses are not), or if it counts
            with a tokenizer of its own.
    """
    names = [name for name, known in _CLASSES.items() if type(segmenter) is known]
    if not names:
        raise ConfigError(
            f"a described segmenter must be one of {_known(_CLASSES)}; "
            f"got an object of class `{type(segmenter).__name__}`; use one of these"
        )
    if getattr(segmenter, "tokenizer", None) is not None:
        raise ConfigError(
            "a described `window` segmenter must count with CLIP's own tokenizer; "
            "got one with a tokenizer passed to it; build it without"
        )
    settings = {key: getattr(segmenter, key) for key in _SETTINGS.get(names[0], ())}
    return {"name": names[0], **settings}


def build_segmenter(description: Mapping[str, Any]) -> Segmenter:
    """Build the splitting strategy of a description; settings left out have their defaults.

    Raises:
        ConfigError: If the name or a setting is unknown, or a setting cannot work.
    """
    if not isinstance(description, Mapping):
        raise ConfigError(
            'a segmenter must be described as {"name": ..., settings}; '
            f"got {description!r}; known names: {_known(_CLASSES)}"
        )
    settings = dict(description)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in _CLASSES:
        raise ConfigError(
            f"the name of a segmenter must be one of {_known(_CLASSES)}; got {name!r}; "
            "use one of these"
        )
    known = _SETTINGS.get(name, ())
    unknown = [key for key in settings if key not in known]
    if unknown:
        allowed = f"only {_known(known)}" if known else "no settings"
        raise ConfigError(f"the segmenter `{name}` takes {allowed}; got {unknown[0]!r}; remove it")
    segmenter: Segmenter = _CLASSES[name](**settings)
    return segmenter


def _known(names: Mapping[str, Any] | tuple[str, ...]) -> str:
    """List names for a message."""
    return ", ".join(f"`{name}`" for name in names)
