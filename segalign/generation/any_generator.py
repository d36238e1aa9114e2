"""Open whatever makes images from captions: a run, an exported folder, a pipeline of diffusers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from segalign.devices import choose_device
from segalign.diffusion.generator import ImageGenerator, Weights
from segalign.diffusion.pipeline_folder import INDEX_FILE
from segalign.diffusion.scheduler_sampler import (
    SamplerName,
    change_sampler,
    sampler_name,
    sampler_settings,
)
from segalign.errors import ConfigError
from segalign.generation.opening import OpenedModel, RunLoader, open_model
from segalign.generation.pipeline_call import CallSettings
from segalign.generation.pipeline_files import names_missing_folder
from segalign.generation.pipeline_generator import PipelineGenerator
from segalign.json_text import parse_json
from segalign.run_directory import BEST_NAME, resolve_checkpoint

Kind = Literal["run", "export", "pipeline"]
_OPTION = "source"


class OpenedGenerator(ImageGenerator, Protocol):
    """A model that can be evaluated.

    Attributes:
        best_weights: The weights that it is used with: the average where there is one.
    """

    best_weights: Weights

    def description(self) -> dict[str, Any]:
        """Say what makes the images, as plain data: ``kind``, ``name``, ``digest``, ...

        The digest may read all files, so one rank at a time is enough.
        """
        ...

    def caption_cuts(self, captions: Sequence[str]) -> dict[str, dict[str, int]]:
        """Count captions that are cut, by tokenizer; empty where the model counts them itself."""
        ...


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """What is changed of a model; None keeps its own.

    Attributes:
        weights: ``raw`` or ``ema`` of a run; None takes the average where there is one.
        dtype: Precision by name. Of a run or exported folder, None is that of the weights, part by
            part, and a lower one rounds on the way; of a pipeline, None is ``float32``, and all
            weights get it.
        sampler: ``ddim``, ``euler``, ``unipc`` or ``dpmpp``.
        num_inference_steps: Steps.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        height: Pixels, given together with ``width`` or not at all; of pipelines alone.
        width: Pixels; of pipelines alone.
        negative_prompt: What images shall not show; of pipelines alone.
        prior: Folder or hub id of the first of two stages; of pipelines alone.
        arguments: Other arguments of a pipeline's call, plain values.
    """

    weights: Weights | None = None
    dtype: str | None = None
    sampler: SamplerName | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    prior: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def open_generator(
    source: str,
    load_run: RunLoader,
    options: GeneratorOptions | None = None,
    *,
    device: str | None = None,
    allow_import: Sequence[str] = (),
) -> OpenedGenerator:
    """Open a model to evaluate.

    Args:
        source: A run, a checkpoint (``RUN/checkpoints/best`` too), a folder of ``main.py export``,
            a folder of diffusers, or a hub id.
        load_run: Builds the module of a run.
        options: What is changed of it.
        device: Where to put it; None takes a GPU if there is one.
        allow_import: Packages whose classes a run's config may name, besides the usual ones.

    Raises:
        ConfigError: If there is nothing of the kind, or it does not take the options.
        DataError: If it is damaged.
    """
    options = options or GeneratorOptions()
    kind = kind_of(source)
    if kind != "run" and options.weights is not None:
        raise ConfigError(
            f"expected no `weights` for `{source}`, which holds one set; got `{options.weights}`. "
            "Leave it out, or name a run."
        )
    if kind == "pipeline":
        return _open_pipeline(source, options, device)
    _refuse_pipeline_options(source, options)
    path = Path(source).expanduser()
    if kind == "run":
        path = resolve_checkpoint(path, option=_OPTION, allows_auto=False)
    opened = open_model(
        path,
        load_run,
        device=device,
        weights=options.weights,
        dtype=options.dtype,
        allow_import=allow_import,
    )
    opened.model.sampler = change_sampler(
        opened.model.sampler, options.sampler, options.num_inference_steps, options.guidance_scale
    )
    return OwnGenerator(opened, kind, _own_name(path, kind))


def kind_of(source: str) -> Kind:
    """Tell what a source names.

    Raises:
        ConfigError: If there is nothing at this place, and it is no hub id.
    """
    path = Path(source).expanduser()
    index = path / INDEX_FILE
    if index.is_file():
        return "export" if _has_segment_encoder(index) else "pipeline"
    if path.is_dir() and (path / "vae").is_dir():
        return "pipeline"
    if path.is_dir() or (path.name == BEST_NAME and path.parent.is_dir()):
        return "run"
    is_path = names_missing_folder(source)
    if source.count("/") == 1 and not is_path:
        return "pipeline"
    why = ", which is the path of a folder, not a hub id" if is_path else ""
    cure = ", or download the hub's model of this name and give its folder" if is_path else ""
    raise ConfigError(
        f"expected `{_OPTION}` to be a run, a checkpoint such as `RUN/checkpoints/best`, a folder "
        f"of `main.py export` or of diffusers, or a hub id `owner/name`; found nothing at "
        f"`{source}`{why}. Correct it{cure}."
    )


class OwnGenerator:
    """A run or an exported folder; an ``OpenedGenerator``.

    Args:
        opened: The model, its sampler set.
        kind: Which of them it is.
        name: Its name, for people.
    """

    def __init__(self, opened: OpenedModel, kind: Kind, name: str) -> None:
        self.opened = opened
        self.kind = kind
        self.name = name
        self.best_weights: Weights = opened.weights

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make images in [0, 1], ``(B, 3, H, W)``: see ``ImageGenerator``.

        Raises:
            ConfigError: If averaged weights are asked for where there are none.
        """
        if self.kind == "export" and weights != "raw":
            raise ConfigError(
                f"expected `weights: raw` for `{self.name}`, which holds one set of weights; got "
                f"`{weights}`. Leave it out, or name the run."
            )
        with self.opened.precision():
            return self.opened.model.generate(captions, sample_ids, eval_seed, weights)

    def description(self) -> dict[str, Any]:
        """Say what makes the images, as plain data."""
        model, sampler = self.opened.model, self.opened.model.sampler
        generator = model.generator
        parts = {"unet": generator.unet, "text": generator.conditioner, "codec": generator.codec}
        return {
            "kind": self.kind,
            "name": self.name,
            "classes": {
                "model": type(model).__name__,
                **{name: type(part).__name__ for name, part in parts.items()},
            },
            "digest": self.opened.digest,
            "weights": self.best_weights if self.kind == "run" else None,
            "dtype": self.opened.dtype,
            "sampler": {
                "name": sampler_name(sampler),
                "num_inference_steps": sampler.num_inference_steps,
                "guidance_scale": sampler.guidance_scale,
                "spacing": sampler.spacing,
                **_plain(sampler_settings(sampler)),
            },
            "image_size": generator.image_size,
        }

    def caption_cuts(self, captions: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return nothing: segment encodings report what they drop themselves."""
        return {}


def _open_pipeline(source: str, options: GeneratorOptions, device: str | None) -> PipelineGenerator:
    settings = CallSettings(
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        height=options.height,
        width=options.width,
        negative_prompt=options.negative_prompt,
        arguments=options.arguments,
    )
    return PipelineGenerator.load(
        source,
        settings,
        prior=options.prior,
        dtype=getattr(torch, options.dtype or "float32"),
        sampler=options.sampler,
        device=choose_device(device),
    )


def _refuse_pipeline_options(source: str, options: GeneratorOptions) -> None:
    for name in ("height", "width", "negative_prompt", "prior", "arguments"):
        value = getattr(options, name)
        if value is not None and value != {}:
            raise ConfigError(
                f"expected no `{name}` for `{source}`, which is a run or an exported folder; got "
                f"{value!r:.40}. Leave it out: it is for pipelines of diffusers."
            )


def _has_segment_encoder(index: Path) -> bool:
    """Tell an exported folder from others; one that cannot be read is for its opener to refuse."""
    try:
        content = parse_json(index.read_bytes())
    except (OSError, ValueError):
        return (index.parent / "segment_encoder").exists()
    return isinstance(content, dict) and "segment_encoder" in content


def _own_name(path: Path, kind: Kind) -> str:
    """Name a model without the place where it is."""
    path = path.resolve()
    if kind == "run" and path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}/{path.name}"
    return path.name


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make tuples lists, as JSON has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
