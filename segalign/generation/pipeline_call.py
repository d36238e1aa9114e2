"""With which arguments a pipeline of diffusers is called."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available

from segalign.errors import ConfigError

_NEEDED = ("prompt", "generator", "output_type")
# What is ours to set, or has a setting of its own.
_RESERVED = frozenset(
    {
        *_NEEDED,
        "guidance_scale",
        "height",
        "latents",
        "negative_prompt",
        "num_images_per_prompt",
        "num_inference_steps",
        "return_dict",
        "self",
        "width",
    }
)
_NOT_PIXELS = ("callback", "prior_callback", "return_dict", "num_images_per_prompt")


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """How a pipeline makes images; None takes the pipeline's own default.

    Attributes:
        num_inference_steps: Steps.
        guidance_scale: Factor of classifier-free guidance.
        height: Pixels.
        width: Pixels.
        negative_prompt: What images shall not show, the same for all.
        arguments: Other arguments of the pipeline's call: numbers, strings, flags, lists of them.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def given(self) -> dict[str, Any]:
        """Return what is not left to the pipeline, by the names of its arguments."""
        named = {name: value for name, value in vars(self).items() if name != "arguments"}
        return {n: v for n, v in named.items() if v is not None} | dict(self.arguments)


def call_arguments(pipeline: DiffusionPipeline, settings: CallSettings) -> dict[str, Any]:
    """Check settings, and add the defaults of the pipeline that they leave.

    Raises:
        ConfigError: If the pipeline does not make images of text alone, takes no such argument, or
            an argument is not plain.
    """
    name = type(pipeline).__name__
    known = inspect.signature(type(pipeline).__call__).parameters
    _check_kind(name, known)
    _check_arguments(name, known, settings)
    if settings.negative_prompt is not None and hasattr(pipeline, "prior_pipe"):
        raise ConfigError(
            f"expected no `negative_prompt` for `{name}`, whose first stage draws other noise with "
            f"one; got `{settings.negative_prompt:.40}`. Leave it out."
        )
    defaults = {
        key: argument.default
        for key, argument in known.items()
        if not key.startswith(_NOT_PIXELS) and key not in _NEEDED and _is_set(argument.default)
    }
    if defaults.get("clean_caption"):
        # Else the pipeline would decide by what is installed, and say so at every batch.
        defaults["clean_caption"] = is_bs4_available() and is_ftfy_available()
    return defaults | settings.given()


def _check_kind(name: str, known: Mapping[str, inspect.Parameter]) -> None:
    needed = [
        key
        for key, argument in known.items()
        if argument.default is argument.empty
        and argument.kind is argument.POSITIONAL_OR_KEYWORD
        and key not in ("self", "prompt")
    ]
    missing = [key for key in _NEEDED if key not in known]
    if needed or missing:
        what = f"needs `{needed[0]}`" if needed else f"takes no `{missing[0]}`"
        raise ConfigError(
            f"expected a pipeline that makes images of text alone; `{name}` {what}. "
            "Choose another model."
        )


def _check_arguments(
    name: str, known: Mapping[str, inspect.Parameter], settings: CallSettings
) -> None:
    for key, value in settings.arguments.items():
        if key in _RESERVED:
            raise ConfigError(
                f"expected no `{key}` in `arguments`, which is set elsewhere; got {value!r:.40}. "
                "Remove it there."
            )
        if not _is_plain(value):
            raise ConfigError(
                f"expected numbers, strings, flags or lists of them in `arguments`; got `{key}`: "
                f"{type(value).__name__}. Remove it."
            )
    for key, value in settings.given().items():
        if key not in known:
            takes = ", ".join(sorted(set(known) - _RESERVED - {"kwargs"}))
            raise ConfigError(
                f"expected arguments that `{name}` takes; got `{key}`: {value!r:.40}. Remove it; "
                f"besides steps, guidance and size there are: {takes}."
            )


def _is_set(default: Any) -> bool:
    return default is not inspect.Parameter.empty and default is not None and _is_plain(default)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
