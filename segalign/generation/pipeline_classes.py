"""The classes that a pipeline of diffusers may be made of: they read settings and safetensors."""

from types import ModuleType
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class
from diffusers.utils import DummyObject as DiffusersDummy
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import DummyObject as TransformersDummy

from segalign.diffusion.pipeline_folder import INDEX_FILE
from segalign.errors import ConfigError, DataError

# They alone can be told to read safetensors only, and to say which weights were missing.
_NETWORKS: tuple[Any, ...] = (ModelMixin, PreTrainedModel)
# They hold no weights.
_OTHERS: tuple[Any, ...] = (
    SchedulerMixin,
    PreTrainedTokenizerBase,
    ImageProcessingMixin,
    FeatureExtractionMixin,
)
# What stands for classes whose packages are missing.
_DUMMIES = (DiffusersDummy, TransformersDummy)


def pipeline_class(source: str, name: Any) -> type[DiffusionPipeline]:
    """Choose the class that makes images of text with a model's parts.

    Args:
        source: Folder or hub id of the model, for messages.
        name: What its index names.

    Raises:
        ConfigError: If it names no pipeline of diffusers.
    """
    known = _member(diffusers, name) if isinstance(name, str) else None
    if not (isinstance(known, type) and issubclass(known, DiffusionPipeline)):
        raise ConfigError(
            f"expected a pipeline of diffusers {diffusers.__version__} in `{source}`; its "
            f"`{INDEX_FILE}` names `{name}`; code that comes with a model is never run. "
            "Choose another model."
        )
    # A decoder is led by its prior, and what edits images can also make them of text alone.
    kind = _get_task_class(
        AUTO_TEXT2IMAGE_PIPELINES_MAPPING, known.__name__, throw_error_if_not_exist=False
    )
    chosen: type[DiffusionPipeline] = kind or known
    return chosen


def part_class(source: str, part: str, library: Any, name: Any) -> type[Any]:
    """Take a class of diffusers or transformers; nothing else is imported.

    Classes that choose another class by a folder's own word, pipelines in pipelines, and networks
    that read their weights in a way of their own are refused: pickles may be among them.

    Args:
        source: Folder or hub id of the model, for messages.
        part: Name of the part, for messages.
        library: Module that its index names.
        name: Class that its index names.

    Raises:
        ConfigError: If the libraries have no such class, or lack a package for it.
        DataError: If the index names no class at all, or one that is not loaded.
    """
    if not (isinstance(library, str) and isinstance(name, str)):
        raise DataError(
            f"expected the name of a class for the part `{part}` of `{source}`; its `{INDEX_FILE}` "
            f"says {[library, name]!r:.80}. Download the model again, or choose another."
        )
    libraries = {"diffusers": diffusers, "transformers": transformers}
    kind = _member(libraries.get(library) or _member(diffusers.pipelines, library), name)
    if not (isinstance(kind, type) and kind.__module__.partition(".")[0] in libraries):
        raise ConfigError(
            f"expected parts of diffusers and transformers in `{source}`; its `{part}` is "
            f"`{library}.{name}`, which they do not have; code that comes with a model is never "
            "run. Choose another model."
        )
    missing: list[str] = getattr(kind, "_backends", []) if isinstance(kind, _DUMMIES) else []
    if missing and "onnx" not in missing:
        packages = ", ".join(f"`{package}`" for package in missing)
        raise ConfigError(
            f"expected the packages {packages}, which the part `{part}` of `{source}`, a `{name}`, "
            "needs; not all are there. Install them, or choose another model."
        )
    if not (_reads_safetensors(kind) or issubclass(kind, _OTHERS)):
        raise DataError(
            "expected networks that are read from safetensors, schedulers, tokenizers and image "
            f"processors as parts of `{source}`; its `{part}` is `{library}.{name}`. Save the "
            "model with a class of these, or choose another."
        )
    return kind


def _reads_safetensors(kind: Any) -> bool:
    """Tell whether a class is a network that is read as its library reads all of them."""
    return any(
        issubclass(kind, base) and kind.from_pretrained.__func__ is base.from_pretrained.__func__
        for base in _NETWORKS
    )


def _member(module: ModuleType | None, name: str) -> Any:
    """Look a name up; modules of both libraries are imported at the first use, which may fail."""
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError):
        return None
