"""The layout of a run directory, and which of its checkpoints can be trusted.

::

    RUN/config.yaml                    resolved config of the first attempt
    RUN/run.json                       one record for each attempt
    RUN/logs/                          TensorBoard and CSV
    RUN/samples/                       pictures
    RUN/checkpoints/step-00001000/     model, ema, optimizer (safetensors), state.json, meta.json

Pure standard library: tools that only look at runs need no PyTorch.
"""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from segalign.atomic import recover_directory, remove_directory
from segalign.errors import ConfigError, DataError

FORMAT_VERSION = 1
META_FILE = "meta.json"
STATE_FILE = "state.json"

_STEP_NAME = re.compile(r"step-(\d{8,})")
_logger = logging.getLogger(__name__)


def checkpoints_directory(run_dir: Path) -> Path:
    """Name the directory that holds a run's checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Name the checkpoint of an optimizer step."""
    return checkpoints_directory(run_dir) / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Read the optimizer step from a checkpoint's name; -1 if it is named otherwise."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run, the oldest first, without looking into them."""
    parent = checkpoints_directory(run_dir)
    if not parent.is_dir():
        return []
    return sorted((p for p in parent.iterdir() if checkpoint_step(p) >= 0), key=checkpoint_step)


def file_digest(path: Path) -> str:
    """Hash a file's content (SHA-256, hexadecimal)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Record size and digest of every file of a checkpoint, but for the record itself."""
    return {
        path.name: {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(directory.iterdir())
        if path.name != META_FILE
    }


def verify_checkpoint(directory: Path) -> dict[str, Any]:
    """Check that a checkpoint is whole: every recorded file has its size and digest.

    Returns:
        The checkpoint's ``meta.json``.

    Raises:
        DataError: If something is missing, damaged, or of a newer format.
    """
    meta = _read_meta(directory)
    for name, recorded in meta["files"].items():
        path = directory / name
        if not path.is_file():
            raise _damaged(directory, f"`{name}` is missing")
        if path.stat().st_size != recorded["size"]:
            raise _damaged(
                directory, f"`{name}` has {path.stat().st_size} bytes, not {recorded['size']}"
            )
        if file_digest(path) != recorded["sha256"]:
            raise _damaged(directory, f"the content of `{name}` does not match its digest")
    return meta


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = json.loads((directory / META_FILE).read_bytes())
        version, files = int(meta["format_version"]), dict(meta["files"])
    except FileNotFoundError as error:
        raise _damaged(directory, f"`{META_FILE}` is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, f"`{META_FILE}` cannot be read") from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"expected a checkpoint of format version <= {FORMAT_VERSION}; "
            f"got version {version} in `{directory}`. Update segalign."
        )
    return {**meta, "files": files}


def _damaged(directory: Path, reason: str) -> DataError:
    return DataError(
        f"expected a whole checkpoint in `{directory}`; {reason}. "
        "Choose another one, or let `--ckpt_path auto` find the newest whole one."
    )


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Find the newest whole checkpoint of a run; damaged ones are skipped with a logged line."""
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
        except DataError as error:
            _logger.warning("skipping a checkpoint: %s", error)
            continue
        return path
    return None


def resolve_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a user means.

    Args:
        path: A checkpoint, a run directory, or its ``checkpoints`` directory; of the last two the
            newest whole checkpoint is meant.

    Raises:
        ConfigError: If there is no checkpoint at this place.
    """
    if (path / META_FILE).is_file() or checkpoint_step(path) >= 0:
        if path.is_dir():
            return path
    else:
        run_dir = path.parent if path.name == "checkpoints" else path
        found = newest_checkpoint(run_dir)
        if found is not None:
            return found
    what = "nothing" if not path.exists() else "no whole checkpoint"
    raise ConfigError(
        f"expected `ckpt_path` to be a checkpoint or run directory; found {what} at `{path}`. "
        "Give a directory such as `RUN/checkpoints/step-00001000`, a run directory, or `auto`."
    )


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints of a run."""
    for path in list_checkpoints(run_dir)[:-keep]:
        remove_directory(path)


def remove_stale(run_dir: Path) -> None:
    """Remove what a killed process left unfinished among a run's checkpoints."""
    parent = checkpoints_directory(run_dir)
    if not parent.is_dir():
        return
    for stale in recover_directory(parent):
        _logger.warning("removed an unfinished checkpoint: %s", stale)


def stored_step(checkpoint: Path) -> int:
    """Read the optimizer step that a checkpoint was taken at.

    Raises:
        DataError: If its ``state.json`` cannot be read.
    """
    try:
        return int(json.loads((checkpoint / STATE_FILE).read_bytes())["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, f"`{STATE_FILE}` cannot be read") from error
