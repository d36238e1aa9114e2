"""Weights of others: a local folder, or a model of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from segalign.errors import ConfigError

# Tensors come as safetensors; other formats, and second copies in other precisions, stay behind.
_WANTED = (
    "*.json",
    "*.txt",
    "*.model",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors",
)


def fetch(model: str, *, what: str, parts: Sequence[str] = (), also: Sequence[str] = ()) -> Path:
    """Find a model's folder; a hub id is downloaded once and kept in the hub's cache.

    Args:
        model: Local folder, or hub id ``owner/name``.
        what: What the model is, for messages: "the text-to-image model".
        parts: Sub-folders that are needed; none means the files at the top.
        also: Further file patterns to download, relative to each part.

    Returns:
        The folder.

    Raises:
        ConfigError: If it is neither there nor can be downloaded, or a part is missing.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model, what, parts, also)
    for part in parts:
        if not (folder / part).is_dir():
            raise ConfigError(
                f"expected {what} with a folder `{part}/` at `{folder}`; found none; "
                f"download the whole of it, or give another model"
            )
    return folder


def _download(model: str, what: str, parts: Sequence[str], also: Sequence[str]) -> Path:
    """Take a model from the hub or its cache."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        _refuse_path(model, what)
    patterns = [
        f"{part}/{name}" if part else name for part in parts or [""] for name in (*_WANTED, *also)
    ]
    try:
        return Path(snapshot_download(model, allow_patterns=["model_index.json", *patterns]))
    except HFValidationError:
        _refuse_path(model, what)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        name = model.partition("/")[2]
        raise ConfigError(
            f"expected {what} `{model}` in the hub's cache or online; got "
            f"{type(error).__name__}; where there is network, run `hf download {model} "
            f"--local-dir models/{name}`, copy the folder here and give it in place of `{model}`"
        ) from error


def _refuse_path(model: str, what: str) -> NoReturn:
    raise ConfigError(
        f"expected {what} at `{model}`; there is no such folder; "
        "give a local folder or a hub id `owner/name`"
    ) from None
