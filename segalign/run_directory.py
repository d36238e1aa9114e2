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

from segalign.atomic import recover_directory, remove_directory, storage_errors
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


def resolve_checkpoint(
    path: Path, *, option: str = "--ckpt_path", allows_auto: bool = True
) -> Path:
    """Find the checkpoint that a user means.

    Args:
        path: A checkpoint, a run directory, or its ``checkpoints`` directory; of the last two the
            newest whole checkpoint is meant.
        option: What the user gave it by, for the message.
        allows_auto: Whether that option takes ``auto`` too.

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
    places = ["a run directory", "a directory such as `RUN/checkpoints/step-00001000`"]
    if allows_auto:
        places.append("`auto`")
    raise ConfigError(
        f"expected `{option}` to be a checkpoint or run directory; found {what} at `{path}`. "
        f"Give {', or '.join(places)}."
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


def superseded_checkpoints(run_dir: Path, start: Path | None) -> list[Path]:
    """List the checkpoints that training from ``start`` would mix with its own, the oldest first.

    Args:
        run_dir: The run directory that training writes into.
        start: The checkpoint that it starts from; None starts anew.

    Returns:
        The later checkpoints if ``start`` is one of this run; otherwise all.
    """
    existing = list_checkpoints(run_dir)
    if start is None or start.resolve().parent != checkpoints_directory(run_dir).resolve():
        return existing
    step = stored_step(start)
    return [path for path in existing if checkpoint_step(path) > step]


def check_start(run_dir: Path, start: Path | None) -> None:
    """Refuse to mix two runs in one directory; later checkpoints that are damaged do not count.

    Args:
        run_dir: The run directory that training writes into.
        start: The checkpoint that it starts from; None starts anew.

    Raises:
        ConfigError: If the directory holds checkpoints that training would mix with its own.
    """
    superseded = superseded_checkpoints(run_dir, start)
    if not superseded:
        return
    newest = superseded[-1].name
    if start is None:
        raise ConfigError(
            f"expected an empty run directory for a new run; `{run_dir}` holds `{newest}`. "
            "Go on with `--ckpt_path auto`, choose another `--run_dir`, or start over with "
            "`--checkpoint.overwrite true`."
        )
    if len(superseded) == len(list_checkpoints(run_dir)):
        raise ConfigError(
            f"expected a run directory without checkpoints to go on from `{start}`; `{run_dir}` "
            f"holds `{newest}` of another run. Choose another `--run_dir`, or delete the other "
            "run's checkpoints with `--checkpoint.overwrite true`."
        )
    whole = next((path.name for path in reversed(superseded) if _is_whole(path)), None)
    if whole is not None:
        raise ConfigError(
            f"expected `{start.name}` to be the newest checkpoint of `{run_dir}`, which holds "
            f"`{whole}` too. Choose another `--run_dir`, or delete the later checkpoints with "
            "`--checkpoint.overwrite true`."
        )


def clear_superseded(run_dir: Path, start: Path | None, *, delete: bool) -> None:
    """Delete, or else rename, the checkpoints that training from ``start`` would mix with its own.

    A renamed checkpoint is neither found nor pruned any more.
    """
    for path in superseded_checkpoints(run_dir, start):
        aside = path.with_name(f"{path.name}.damaged")
        if delete:
            remove_directory(path)
            continue
        with storage_errors(aside):
            if aside.exists():
                remove_directory(aside)
            path.rename(aside)
        _logger.warning("set a damaged checkpoint aside: %s", aside)


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except DataError:
        return False
    return True


def stored_step(checkpoint: Path) -> int:
    """Read the optimizer step that a checkpoint was taken at.

    Raises:
        DataError: If its ``state.json`` cannot be read.
    """
    try:
        return int(_read_state(checkpoint)["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, f"`{STATE_FILE}` cannot be read") from error


def stored_config(checkpoint: Path) -> dict[str, Any] | None:
    """Read the resolved config that a checkpoint was trained with, encoded; None if it has none.

    Raises:
        DataError: If its ``state.json`` cannot be read.
    """
    config = _read_state(checkpoint).get("run_config")
    return config if isinstance(config, dict) else None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((checkpoint / STATE_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, f"`{STATE_FILE}` cannot be read") from error
