"""Make the images of a command: open a model, make what is missing, write the page."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError

from segalign.atomic import write_text_atomic
from segalign.diffusion.generator import ImageGenerator, TextToImage, Weights
from segalign.diffusion.long_text_pipeline import LongTextPipeline, precision
from segalign.diffusion.pipeline_folder import INDEX_FILE, RECORD_FILE
from segalign.diffusion.scheduler_sampler import Sampler
from segalign.errors import ConfigError, DataError
from segalign.generation.contact_sheet import render_sheet, sheet_entries
from segalign.generation.image_folder import SHEET_FILE, ImageFolder, ImageJob
from segalign.generation.prompts import Prompt
from segalign.generation.segment_marks import mark_prompt
from segalign.run_directory import META_FILE, file_digest, resolve_checkpoint


class GeneratingModel(ImageGenerator, Protocol):
    """A training module or pipeline that makes images.

    Attributes:
        generator: Network, text encoder, codec.
        sampler: How images are made.
    """

    generator: TextToImage
    sampler: Sampler


class RunLoader(Protocol):
    """Builds the module of a run; ``main.py`` brings it."""

    def __call__(self, path: Path, *, device: torch.device, allow_import: Sequence[str]) -> Any:
        """Return the module of a run or checkpoint, its weights filled in."""


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model to make images with.

    Attributes:
        model: The model.
        digest: Digest of its weights and settings.
        weights: The weights to use.
        device: Where it is.
    """

    model: GeneratingModel
    digest: str
    weights: Weights
    device: torch.device


def open_model(
    path: Path,
    load_run: RunLoader,
    *,
    device: str | None = None,
    weights: Weights | None = None,
    allow_import: Sequence[str] = (),
) -> OpenedModel:
    """Open a run, a checkpoint or an exported folder.

    Args:
        path: Where it is.
        load_run: Builds the module of a run.
        device: Where to put it; None takes a GPU if there is one.
        weights: The weights to use; None takes the average where there is one.
        allow_import: Packages whose classes a run's config may name, besides the usual ones.

    Raises:
        ConfigError: If there is nothing of the kind, or it makes no images.
        DataError: If it is damaged.
    """
    place = choose_device(device)
    if (path / INDEX_FILE).is_file():
        if weights is not None:
            raise ConfigError(
                f"expected no `--weights` for the exported folder `{path}`, which holds one set; "
                f"got `{weights}`. Leave it out, or name the run."
            )
        return OpenedModel(_open_folder(path, place), _folder_digest(path), "raw", place)
    checkpoint = resolve_checkpoint(path)
    module = load_run(checkpoint, device=place, allow_import=allow_import)
    if not isinstance(module, ImageGenerator):
        raise ConfigError(
            f"expected a run of a model that makes images in `{path}`; got "
            f"`{type(module).__name__}`. Name another run."
        )
    chosen = choose_weights(module, weights)
    digest = file_digest(checkpoint / META_FILE)
    return OpenedModel(cast("GeneratingModel", module), digest, chosen, place)


def choose_device(name: str | None) -> torch.device:
    """Take the named device, or a GPU if there is one.

    Raises:
        ConfigError: If there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"expected a device that is there, such as `cpu` or `cuda:0`; got `{name}`. "
            "Choose another `--device`."
        ) from error


def choose_weights(module: object, wanted: Weights | None) -> Weights:
    """Take the wanted weights, or the average if a module has one.

    Raises:
        ConfigError: If an average is wanted and there is none.
    """
    has_average = getattr(module, "ema", None) is not None
    if wanted == "ema" and not has_average:
        raise ConfigError(
            "expected averaged weights for `--weights ema`; the run keeps none. Use `raw`."
        )
    return wanted or ("ema" if has_average else "raw")


def plan_jobs(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[ImageJob]:
    """List the images to make: every prompt with every seed, or with the one of its own."""
    return [
        ImageJob(prompt, seed)
        for prompt in prompts
        for seed in ((prompt.seed,) if prompt.seed is not None else dict.fromkeys(seeds))
    ]


def make_images(
    opened: OpenedModel,
    jobs: Sequence[ImageJob],
    folder: ImageFolder,
    *,
    batch_size: int,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    """Make images in batches; an image does not depend on its batch.

    Args:
        opened: The model.
        jobs: The images to make.
        folder: Where they are written.
        batch_size: Images made at a time.
        dtype: Precision of the networks; weights stay as they are.
        advance: Told of how many images are done.
    """
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        with precision(opened.device, dtype):
            images = opened.model.generate(
                [job.prompt.text for job in batch],
                [job.prompt.sample_id for job in batch],
                [job.seed for job in batch],
                opened.weights,
            )
        for job, image in zip(batch, images, strict=True):
            folder.write(job, image)
            advance(1)


def write_overview(opened: OpenedModel, jobs: Sequence[ImageJob], folder: ImageFolder) -> None:
    """Write the records and the page of all images that are in a folder."""
    records = folder.write_records(jobs)
    conditioner = opened.model.generator.conditioner
    entries = sheet_entries(records, lambda prompt: mark_prompt(conditioner, prompt))
    settings = asdict(folder.settings)
    settings["checkpoint"] = folder.settings.checkpoint[:12]
    page = render_sheet(entries, settings, f"{len(records)} images of {len(entries)} prompts")
    write_text_atomic(folder.path / SHEET_FILE, page)


def network_dtype(opened: OpenedModel, name: str | None) -> torch.dtype:
    """Return the precision to compute in: the named one, or that of the network's weights."""
    if name is not None:
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    weight: torch.Tensor = next(opened.model.generator.unet.parameters())
    return weight.dtype


def _open_folder(path: Path, device: torch.device) -> LongTextPipeline:
    try:
        pipeline: LongTextPipeline = LongTextPipeline.from_pretrained(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"expected a whole folder that `main.py export` has written at `{path}`; got: "
            f"{reason}. Export the run again."
        ) from error
    pipeline.to(device)
    return pipeline


def _folder_digest(path: Path) -> str:
    """Digest an exported folder by its record, or without one by its files."""
    record = path / RECORD_FILE
    if record.is_file():
        return file_digest(record)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    content = "".join(f"{file.relative_to(path)} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(content.encode()).hexdigest()
