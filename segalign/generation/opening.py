"""Open a run, a checkpoint or an exported folder to make images with."""

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from torch import nn

from segalign.devices import choose_device
from segalign.diffusion.generator import ImageGenerator, TextToImage, Weights
from segalign.diffusion.long_text_pipeline import LongTextPipeline
from segalign.diffusion.pipeline_folder import INDEX_FILE, RECORD_FILE, check_files
from segalign.diffusion.scheduler_sampler import Sampler
from segalign.errors import ConfigError, DataError
from segalign.json_text import parse_json
from segalign.run_directory import META_FILE, file_digest, resolve_checkpoint

WIDE = "float32"
_LOADING_ERRORS = (
    AttributeError, LookupError, OSError, RecursionError, SafetensorError, TypeError, ValueError
)  # fmt: skip
_RAW: Weights = "raw"


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
        dtype: What it computes in, by name: the dtype that was asked for, or those of its weights,
            joined by ``+``.
        autocast: The dtype that was asked for, where the weights are of another; else None.
    """

    model: GeneratingModel
    digest: str
    weights: Weights
    device: torch.device
    dtype: str
    autocast: torch.dtype | None = None

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in ``dtype`` for the duration of a block; weights stay as they are."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def open_model(
    path: Path,
    load_run: RunLoader,
    *,
    device: str | None = None,
    weights: Weights | None = None,
    dtype: str | None = None,
    allow_import: Sequence[str] = (),
) -> OpenedModel:
    """Open a run, a checkpoint or an exported folder.

    Args:
        path: Where it is.
        load_run: Builds the module of a run.
        device: Where to put it; None takes a GPU if there is one.
        weights: The weights to use; None takes the average where there is one.
        dtype: Precision to compute in; None takes that of the weights, part by part. ``float32``
            widens the weights; the others leave them as they are and round on the way.
        allow_import: Packages whose classes a run's config may name, besides the usual ones.

    Raises:
        ConfigError: If there is nothing of the kind, or it makes no images.
        DataError: If it is damaged.
    """
    place = choose_device(device)
    model: Any
    if (path / INDEX_FILE).is_file() or _is_plain(path):
        model, digest, chosen = _open_folder(path, weights, dtype), _folder_digest(path), _RAW
        parts = [part for part in model.components.values() if isinstance(part, nn.Module)]
        model.to(place)
    else:
        checkpoint = resolve_checkpoint(path, option="--checkpoint", allows_auto=False)
        model = _open_run(checkpoint, load_run, place, allow_import)
        digest, chosen = file_digest(checkpoint / META_FILE), choose_weights(model, weights)
        parts = [model]
        if dtype == WIDE:
            nn.Module.to(model, torch.float32)
    own = _dtype_names(parts)
    autocast = None if dtype in (None, WIDE, own) else cast("torch.dtype", getattr(torch, dtype))
    return OpenedModel(model, digest, chosen, place, dtype or own, autocast)


def choose_weights(module: object, wanted: Weights | None) -> Weights:
    """Take the wanted weights, or the average if a module has one.

    Raises:
        ConfigError: If an average is wanted and there is none.
    """
    has_average = getattr(module, "ema", None) is not None
    if wanted == "ema" and not has_average:
        raise ConfigError("expected averaged weights for `ema`; the run keeps none. Use `raw`.")
    return wanted or ("ema" if has_average else "raw")


def _open_run(
    checkpoint: Path, load_run: RunLoader, device: torch.device, allow_import: Sequence[str]
) -> Any:
    module = load_run(checkpoint, device=device, allow_import=allow_import)
    if not isinstance(module, ImageGenerator):
        raise ConfigError(
            f"expected a run of a model that makes images in `{checkpoint}`; got "
            f"`{type(module).__name__}`. Name another run."
        )
    return module


def _open_folder(path: Path, weights: Weights | None, dtype: str | None) -> LongTextPipeline:
    """Load an exported folder, its files checked."""
    if _is_plain(path):
        raise ConfigError(
            f"expected a run, or a folder of `main.py export`; `{path}` is a plain model of "
            f"diffusers. Make one with `main.py import longsd --base {path} ...`, or name a run."
        )
    if weights is not None:
        raise ConfigError(
            f"expected no `--weights` for the exported folder `{path}`, which holds one set; "
            f"got `{weights}`. Leave it out, or name the run."
        )
    if (path / RECORD_FILE).is_file():
        check_files(path)
    settings = {"dtype": torch.float32} if dtype == WIDE else {}
    try:
        return LongTextPipeline.from_pretrained(path, **settings)
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"expected a whole folder that `main.py export` has written at `{path}`; got: "
            f"{reason}. Export the run again."
        ) from error


def _is_plain(path: Path) -> bool:
    """Tell whether a folder holds a model of diffusers without a segment encoder."""
    if (path / "segment_encoder").exists() or not (path / "unet").is_dir():
        return False
    try:
        index = parse_json((path / INDEX_FILE).read_bytes())
    except (OSError, ValueError):
        return (path / "vae").is_dir()
    return isinstance(index, dict) and "segment_encoder" not in index


def _folder_digest(path: Path) -> str:
    """Digest an exported folder by its record, which names all digests, or else by its files."""
    record = path / RECORD_FILE
    if record.is_file():
        return file_digest(record)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    content = "".join(f"{file.relative_to(path)} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(content.encode()).hexdigest()


def _dtype_names(parts: Iterable[nn.Module]) -> str:
    """Name the precisions of all weights, sorted."""
    found = {weight.dtype for part in parts for weight in part.parameters()}
    names = {str(dtype).removeprefix("torch.") for dtype in found if dtype.is_floating_point}
    return "+".join(sorted(names))
