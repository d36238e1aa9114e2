"""Load a pipeline of diffusers part by part: safetensors alone, and every weight of them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from segalign.diffusion.network_files import check_whole, reading
from segalign.diffusion.scheduler_sampler import SamplerName
from segalign.errors import ConfigError
from segalign.generation.pipeline_files import WHAT, PartFiles, PipelineFiles

_ADAPTER = "adapter_config.json"
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
}


def load_pipeline(
    files: PipelineFiles, *, dtype: torch.dtype, sampler: SamplerName | None = None
) -> DiffusionPipeline:
    """Load a pipeline on the CPU, in evaluation mode, frozen.

    Args:
        files: Where its parts are.
        dtype: Precision of all weights.
        sampler: Scheduler of diffusers to use with the noise levels of its own; None takes its own.

    Raises:
        ConfigError: If a part cannot be read or is not whole, or the scheduler does not fit.
    """
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        parts = {name: _load(name, part, dtype) for name, part in files.parts.items()}
        if sampler is not None:
            parts["scheduler"] = _change_scheduler(parts.get("scheduler"), sampler, files.name)
        with reading(WHAT, files.indexes[0].parent):
            pipeline: DiffusionPipeline = files.kind(**parts, **files.settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from drawing bars, and from warning of each long caption.

    Nor is it for users to hear how pipelines call each other by arguments that are to go.
    """
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        for library in libraries:
            library.set_verbosity_error()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _load(name: str, part: PartFiles, dtype: torch.dtype) -> Any:
    """Load one part; the libraries would draw weights that its files lack."""
    what = f"{WHAT}'s `{name}`"
    read: Callable[..., Any] = part.kind.from_pretrained
    if issubclass(part.kind, PreTrainedTokenizerBase):
        _check_vocabulary(what, part.folder)
    with reading(what, part.folder):
        if not issubclass(part.kind, nn.Module):
            return read(part.folder)
        _refuse_adapter(what, part.folder)
        key = "dtype" if issubclass(part.kind, PreTrainedModel) else "torch_dtype"
        settings = {key: dtype, "use_safetensors": True, "output_loading_info": True}
        network, info = read(part.folder, **settings)
    check_whole(info, what, part.folder)
    return network.eval().requires_grad_(False)


def _refuse_adapter(what: str, folder: Path) -> None:
    """Refuse what transformers would load besides a network's own weights, also from a pickle.

    Raises:
        ConfigError: If there is an adapter beside the weights.
    """
    if (folder / _ADAPTER).exists():
        raise ConfigError(
            f"expected {what} at `{folder}` without an adapter; found `{_ADAPTER}`. Merge it into "
            "the weights, or remove it."
        )


def _check_vocabulary(what: str, folder: Path) -> None:
    """Refuse a tokenizer that the library would make without words, or could not read.

    Raises:
        ConfigError: If its files are not there, or need packages that are not.
    """
    if any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        return
    found = next(iter(sorted(folder.glob("*.model"))), None)
    if found is None:
        raise ConfigError(
            f"expected {what} at `{folder}` with a vocabulary; found neither `tokenizer.json` nor "
            "`vocab.json` with `merges.txt` nor `spiece.model`. Download the whole model."
        )
    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise ConfigError(
            f"expected the packages `sentencepiece` and `protobuf`, by which `{found.name}` of "
            f"{what} is read; one is missing. Install them, or put a `tokenizer.json` beside it."
        )


def _change_scheduler(own: Any, sampler: SamplerName, model: str) -> Any:
    """Make a scheduler with the noise levels of another one."""
    known = {kind.__name__: kind for kind in getattr(own, "compatibles", [])}
    kind = known.get(_SCHEDULERS[sampler])
    if kind is None:
        raise ConfigError(
            f"expected a `sampler` that fits the noise levels of `{model}`; its scheduler "
            f"`{type(own).__name__}` cannot be exchanged for `{sampler}`. Leave `sampler` out."
        )
    return kind.from_config(own.config)
