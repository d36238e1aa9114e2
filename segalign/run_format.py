"""Checkpoints on disk: tensors as safetensors, everything else as JSON, written atomically.

A checkpoint is a directory: ``model.safetensors`` (``state_dict``), ``optimizer.safetensors``
(``optimizer_states``), ``ema.safetensors`` (``ema.weights``), ``extra.safetensors`` (other
tensors), ``state.json`` (counters and nesting), ``meta.json`` (format version, size and digest of
every file). Nothing is pickled, so loading a foreign checkpoint runs no code.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segalign.atomic import (
    make_directory,
    move_directory_into_place,
    storage_errors,
    sync_directory,
    sync_file,
    temporary_sibling,
    usual_mode,
)
from segalign.errors import DataError, StorageError
from segalign.run_directory import (
    FORMAT_VERSION,
    META_FILE,
    STATE_FILE,
    describe_files,
    verify_checkpoint,
)
from segalign.tree_codec import decode_tree, encode_tree


def save_checkpoint(tree: Mapping[str, Any], directory: Path) -> None:
    """Write a checkpoint, whole or not at all; an existing one of this name is replaced.

    Args:
        tree: Nested state, see ``segalign.tree_codec.encode_tree``.
        directory: Target; its parents are created.

    Raises:
        TypeError: If the tree holds something that is neither plain data nor a tensor.
        StorageError: If the disk is full or the place cannot be written. Nothing is left behind,
            and an existing checkpoint of this name is untouched.
    """
    document, tensors = encode_tree(tree)
    make_directory(directory.parent)
    temporary = temporary_sibling(directory)
    with storage_errors(directory):
        try:
            temporary.mkdir()
            for stem, named in tensors.items():
                _write_tensors(temporary / f"{stem}.safetensors", named)
            _write_json(temporary / STATE_FILE, document)
            meta = {"format_version": FORMAT_VERSION, "files": describe_files(temporary)}
            _write_json(temporary / META_FILE, meta)
            sync_directory(temporary)
            move_directory_into_place(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def load_checkpoint(directory: Path) -> dict[str, Any]:
    """Read a checkpoint back, after checking every file's size and digest.

    Returns:
        The saved tree; its tensors are on the CPU and own their memory.

    Raises:
        DataError: If the checkpoint is damaged or of a newer format.
    """
    meta = verify_checkpoint(directory)
    try:
        tensors = {
            Path(name).stem: read_tensors(directory / name)
            for name in meta["files"]
            if name.endswith(".safetensors")
        }
        document = json.loads((directory / STATE_FILE).read_bytes())
        tree = decode_tree(document, tensors)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"expected a readable checkpoint in `{directory}`; got: {error}. Choose another one."
        ) from error
    return dict(tree)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into CPU tensors that do not depend on the file any longer.

    Raises:
        DataError: If the file is missing or is not safetensors.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"expected a safetensors file at `{path}`; got: {error}. Choose another file."
        ) from error


def _write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    try:
        save_file(_own_memory(named), path)
        path.chmod(usual_mode(path.parent))
    except SafetensorError as error:
        raise StorageError(
            f"expected to be able to write `{path}`; got: {error}. "
            "Free some space, fix its permissions, or choose another place."
        ) from error
    sync_file(path)


def _own_memory(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that are views or share memory, which safetensors refuses."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in named.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        owned[name] = plain
    return owned


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
    sync_file(path)
