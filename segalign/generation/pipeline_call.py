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
        height: Pixels, given together with ``width`` or not at all.
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
        ConfigError: If the pipeline does not make images of text alone, takes no such argument,
            would pay no heed to one, or an argument is not plain.
    """
    name = type(pipeline).__name__
    known = inspect.signature(type(pipeline).__call__).parameters
    _check_kind(name, known)
    _check_arguments(name, known, settings)
    _check_size(settings)
    defaults = {
        key: argument.default
        for key, argument in known.items()
        if not key.startswith(_NOT_PIXELS) and key not in _NEEDED and _is_set(argument.default)
    }
    if defaults.get("clean_caption"):
        # Else the pipeline would decide by what is installed, and say so at every batch.
        defaults["clean_caption"] = is_bs4_available() and is_ftfy_available()
    arguments = defaults | settings.given()
    if settings.negative_prompt is not None:
        _check_negative_prompt(pipeline, settings.negative_prompt, arguments)
    return _without_eta(pipeline, arguments, is_given="eta" in settings.arguments)


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


def _check_size(settings: CallSettings) -> None:
    """Refuse half a size, in place of which pipelines take their own."""
    if (settings.height is None) != (settings.width is None):
        raise ConfigError(
            f"expected both `height` and `width`, or neither; got {settings.height} and "
            f"{settings.width}. Set both."
        )


def _check_negative_prompt(
    pipeline: DiffusionPipeline, negative_prompt: str, arguments: Mapping[str, Any]
) -> None:
    name = type(pipeline).__name__
    if hasattr(pipeline, "prior_pipe"):
        raise ConfigError(
            f"expected no `negative_prompt` for `{name}`, whose first stage draws other noise with "
            f"one; got `{negative_prompt:.40}`. Leave it out."
        )
    # Where there are two scales, the other one is an input of the network.
    scale = next((key for key in ("true_cfg_scale", "guidance_scale") if key in arguments), None)
    if scale is not None and not _is_guided(pipeline, scale, arguments[scale]):
        raise ConfigError(
            f"expected a `{scale}` at which `{name}` is guided, as `negative_prompt` is not looked "
            f"at without; got {arguments[scale]}. Raise it above 1, or leave `negative_prompt` out."
        )


def _is_guided(pipeline: DiffusionPipeline, name: str, scale: float) -> bool:
    """Ask a pipeline whether it has classifier-free guidance at a scale; not all can say."""
    if name != "guidance_scale":
        return scale > 1
    pipeline._guidance_scale = scale  # each call sets it
    return bool(getattr(pipeline, "do_classifier_free_guidance", scale > 1))


def _without_eta(
    pipeline: DiffusionPipeline, arguments: dict[str, Any], *, is_given: bool
) -> dict[str, Any]:
    """Leave a default ``eta`` out where the scheduler takes none.

    Raises:
        ConfigError: If it is given, and would be passed over.
    """
    scheduler = pipeline.components.get("scheduler")
    step = getattr(scheduler, "step", None)
    if "eta" not in arguments or step is None or "eta" in inspect.signature(step).parameters:
        return arguments
    if is_given:
        raise ConfigError(
            f"expected no `eta` in `arguments`, which the scheduler `{type(scheduler).__name__}` "
            f"does not take; got {arguments['eta']!r:.40}. Remove it, or choose another `sampler`."
        )
    return {name: value for name, value in arguments.items() if name != "eta"}


def _is_set(default: Any) -> bool:
    return default is not inspect.Parameter.empty and default is not None and _is_plain(default)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
