"""Checkpoints on disk: tensors as safetensors, everything else as JSON, written atomically.

A checkpoint is a directory: ``model.safetensors`` (``state_dict``), ``optimizer.safetensors``
(``optimizer_states``), ``ema.safetensors`` (``ema.weights``), ``extra.safetensors`` (other
tensors), ``state.json`` (counters and nesting), ``meta.json`` (format version, size and digest of
every file). Nothing is pickled, so loading a foreign checkpoint runs no code.

A run stores in it what is trained, its optimizers and learning rate schedules, its average, the
counters of all loops, and its resolved config. There is no state of a random generator: what is
random in a step, the data order included, is a function of the config's seed and the counters.
"""

import json
import os
import re
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
from segalign.json_text import parse_json
from segalign.run_directory import (
    FORMAT_VERSION,
    META_FILE,
    STATE_FILE,
    describe_files,
    verify_checkpoint,
)
from segalign.tree_codec import decode_tree, encode_tree

# How the safetensors library quotes an error of the system.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def save_checkpoint(tree: Mapping[str, Any], directory: Path) -> None:
    """Write a checkpoint, whole or not at all; an existing one of this name is replaced.

    Args:
        tree: Nested state, see ``segalign.tree_codec.encode_tree``.
        directory: Target; its parents are created.

    Raises:
        TypeError: If the tree holds something that is neither plain data nor a tensor.
        FullDiskError: If there is no room for it. Nothing is left behind, and an existing
            checkpoint of this name is untouched.
        StorageError: If the place cannot be written for another reason; the same holds.
    """
    document, tensors = encode_tree(tree)
    state = _as_json(document)
    num_bytes = len(state) + sum(
        tensor.nbytes for named in tensors.values() for tensor in named.values()
    )
    make_directory(directory.parent, num_bytes)
    temporary = temporary_sibling(directory)
    with storage_errors(directory, num_bytes):
        try:
            temporary.mkdir()
            for stem, named in tensors.items():
                _write_tensors(temporary / f"{stem}.safetensors", named)
            _write_bytes(temporary / STATE_FILE, state)
            meta = {"format_version": FORMAT_VERSION, "files": describe_files(temporary)}
            _write_bytes(temporary / META_FILE, _as_json(meta))
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
        document = parse_json((directory / STATE_FILE).read_bytes())
        tree = dict(decode_tree(document, tensors))
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"expected a readable checkpoint in `{directory}`; got: {error}. Choose another one."
        ) from error
    return tree


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
        code = _SYSTEM_ERROR.search(str(error))
        if code is not None:
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
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


def _as_json(document: Any) -> bytes:
    return json.dumps(document, indent=1, allow_nan=False).encode()


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
