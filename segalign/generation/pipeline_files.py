"""A pipeline of diffusers by folder or hub id: its class, its parts, and their files.

Everything is read as tensors and settings: no pickle is opened, and no code of a model is run.
"""

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from segalign.diffusion.network_files import reading
from segalign.diffusion.pipeline_folder import INDEX_FILE
from segalign.errors import ConfigError
from segalign.generation.pipeline_classes import part_class, pipeline_class
from segalign.hub import fetch
from segalign.json_text import parse_json
from segalign.run_directory import file_digest

WHAT = "the text-to-image model"
_CARD = "README.md"
# What is not loaded: images that a checker blanks would enter metrics as images of the model. The
# extractor serves the checker.
_LEFT_OUT = ("safety_checker", "feature_extractor")
_SWITCHED_OFF = {"requires_safety_checker": False, "add_watermarker": False}
_PRIOR = "prior_"
# How paths begin, and what this project's own folders are called: no hub id is meant by them.
_PATHS = (".", "/", "~")
_LOCAL_FOLDERS = ("runs", "models", "exported", "data")
# What is loaded of a folder; further copies of weights, such as `model.fp16.safetensors`, are not.
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors")
_SETTINGS = {".json", ".txt", ".model"}


@dataclass(frozen=True)
class PartFiles:
    """Where a part of a pipeline is read from.

    Attributes:
        kind: Its class, of diffusers or transformers.
        folder: Its folder.
    """

    kind: type[Any]
    folder: Path


@dataclass(frozen=True)
class PipelineFiles:
    """What a pipeline is made of; nothing heavy is read yet.

    Attributes:
        name: Hub id, or last component of the folder.
        revision: Commit of a model of the hub, else None.
        kind: Class of the pipeline.
        parts: Parts by the argument of the class that takes them.
        settings: The other arguments. Watermarks and safety checkers are off.
        indexes: Files that say what the parts are.
    """

    name: str
    revision: str | None
    kind: type[DiffusionPipeline]
    parts: Mapping[str, PartFiles]
    settings: Mapping[str, Any]
    indexes: tuple[Path, ...]

    def digest(self) -> str:
        """Digest everything that is loaded, SHA-256 in hexadecimal; reads all of it once."""
        names = dict(self._loaded())
        content = "".join(f"{name} {file_digest(names[name])}\n" for name in sorted(names))
        return hashlib.sha256(content.encode()).hexdigest()

    def _loaded(self) -> Iterator[tuple[str, Path]]:
        for number, index in enumerate(self.indexes):
            yield f"{number}/{INDEX_FILE}", index
        for name, part in self.parts.items():
            for file in sorted(part.folder.rglob("*")):
                if file.suffix in _SETTINGS or _WEIGHTS.fullmatch(file.name):
                    yield f"{name}/{file.relative_to(part.folder).as_posix()}", file


def find_pipeline(source: str, prior: str | None = None) -> PipelineFiles:
    """Find a text-to-image pipeline.

    Args:
        source: Local folder with a ``model_index.json``, or hub id ``owner/name``, which is
            downloaded once.
        prior: Folder or hub id of the first stage, for a folder that holds only the second; None
            takes the one that its ``README.md`` names.

    Raises:
        ConfigError: If it is not there or not whole, if it needs code of its own, or makes no
            images of text.
        DataError: If it names parts that are not loaded, such as ``AutoModel``.
    """
    folder, index = _open(source)
    kind = pipeline_class(source, index.get("_class_name"))
    parts = _parts(source, index)
    indexes: tuple[Path, ...] = (folder / INDEX_FILE,)
    arguments = inspect.signature(kind).parameters
    if any(name.startswith(_PRIOR) and name not in parts for name in arguments):
        prior = prior or _named_prior(source, folder)
        prior_folder, prior_index = _open(prior)
        indexes = (*indexes, prior_folder / INDEX_FILE)
        found = _parts(prior, prior_index)
        parts |= {f"{_PRIOR}{name}": part for name, part in found.items()}
    elif prior is not None:
        raise ConfigError(
            f"expected no `prior` for `{source}`, which has all its stages; got `{prior}`. "
            "Leave it out."
        )
    parts = {name: part for name, part in parts.items() if name in arguments}
    return PipelineFiles(
        name=source if not Path(source).expanduser().is_dir() else folder.resolve().name,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        kind=kind,
        parts=parts,
        settings=_settings(source, index, arguments, parts),
        indexes=indexes,
    )


def names_missing_folder(source: str) -> bool:
    """Tell a mistyped path from a hub id: else a stranger's model would be asked for.

    Args:
        source: Folder or hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return False
    is_beside_others = len(path.parts) > 1 and path.parent.is_dir()
    return source.startswith(_PATHS) or path.parts[0] in _LOCAL_FOLDERS or is_beside_others


def _open(source: str) -> tuple[Path, dict[str, Any]]:
    """Find a model's folder, and read what it is made of."""
    if names_missing_folder(source):
        raise ConfigError(
            f"expected {WHAT} at `{source}`; there is no such folder, and by its beginning it is "
            "no hub id. Correct it, or download the hub's model and give its folder."
        )
    folder = fetch(source, what=WHAT, also=(_CARD,))
    with reading(f"{WHAT}'s `{INDEX_FILE}`", folder):
        index = dict(parse_json((folder / INDEX_FILE).read_bytes()))
    return folder, index


def _parts(source: str, index: Mapping[str, Any]) -> dict[str, PartFiles]:
    """Find the folders of all parts that are loaded."""
    named = {
        name: entry
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] and name not in _LEFT_OUT
    }
    kinds = {name: part_class(source, name, *entry) for name, entry in named.items()}
    folder = fetch(source, what=WHAT, parts=tuple(kinds))
    return {name: PartFiles(kind, folder / name) for name, kind in kinds.items()}


def _named_prior(source: str, folder: Path) -> str:
    """Read which first stage the card of a second stage names."""
    card = folder / _CARD
    names: Any = None
    if card.is_file():
        with reading(f"{WHAT}'s `{_CARD}`", folder):
            names = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("prior")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise ConfigError(
        f"expected both stages of a model of two; `{source}` holds the second, and its `{_CARD}` "
        "names no first. Set `prior` to the folder or hub id of the first."
    )


def _settings(
    source: str,
    index: Mapping[str, Any],
    arguments: Mapping[str, inspect.Parameter],
    parts: Mapping[str, PartFiles],
) -> dict[str, Any]:
    """Return the arguments of a pipeline's class that are no parts.

    Raises:
        ConfigError: If a part is missing.
    """
    own = {n: value for n, value in index.items() if not isinstance(value, list | None)}
    settings = {
        name: value for name, value in {**own, **_SWITCHED_OFF}.items() if name in arguments
    }
    settings |= {name: None for name in _LEFT_OUT if name in arguments}
    for name, argument in arguments.items():
        if name in parts or name in settings or argument.default is not argument.empty:
            continue
        if index.get(name) != [None, None]:
            raise ConfigError(
                f"expected {WHAT} `{source}` with a part `{name}`; its `{INDEX_FILE}` names none. "
                "Download the whole of it, or give another model."
            )
        settings[name] = None
    return settings
