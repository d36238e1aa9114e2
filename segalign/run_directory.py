"""The layout of a run directory, and which of its checkpoints can be trusted.

::

    RUN/config.yaml                    resolved config of the first attempt
    RUN/run.json                       one record for each attempt
    RUN/logs/                          TensorBoard and CSV
    RUN/samples/                       pictures
    RUN/checkpoints/step-00001000/     model, ema, optimizer (safetensors), state.json, meta.json
    RUN/checkpoints/best.json          which of them is the best, and by what
    RUN/checkpoints/followed.json      what came after them, so that a stop cuts nothing off

Pure standard library: tools that only look at runs need no PyTorch.
"""

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segalign.atomic import bring_back, storage_errors, write_text_atomic
from segalign.errors import ConfigError, DataError
from segalign.json_text import parse_json

FORMAT_VERSION = 1
META_FILE = "meta.json"
STATE_FILE = "state.json"
BEST_FILE = "best.json"
BEST_NAME = "best"

_STEP_NAME = re.compile(r"step-(\d{8,})")
# What reading a file of JSON can raise that holds anything but what it should.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError)
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


def verify_checkpoint(directory: Path, *, digests: bool = True) -> dict[str, Any]:
    """Check that a checkpoint is whole: every recorded file has its size and digest.

    Args:
        directory: The checkpoint.
        digests: Whether the files are read; without it, only their sizes are looked at.

    Returns:
        The checkpoint's ``meta.json``.

    Raises:
        DataError: If something is missing, damaged, or of a newer format.
    """
    meta = _read_meta(directory)
    for name, recorded in meta["files"].items():
        fault = _find_fault(directory / name, recorded, digests=digests)
        if fault is not None:
            raise _damaged(directory, fault)
    return meta


def _find_fault(path: Path, recorded: dict[str, Any], *, digests: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            return f"`{path.name}` has {size} bytes, not {recorded['size']}"
        if digests and file_digest(path) != recorded["sha256"]:
            return f"the content of `{path.name}` does not match its digest"
    except FileNotFoundError:
        return f"`{path.name}` is missing"
    except OSError as error:
        return f"`{path.name}` cannot be read ({error.strerror})"
    return None


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = parse_json((directory / META_FILE).read_bytes())
        version, files = int(meta["format_version"]), dict(meta["files"])
    except FileNotFoundError as error:
        raise _damaged(directory, f"`{META_FILE}` is missing") from error
    except _UNREADABLE as error:
        raise _damaged(directory, f"`{META_FILE}` cannot be read") from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"expected a checkpoint of format version <= {FORMAT_VERSION}; "
            f"got version {version} in `{directory}`. Update segalign."
        )
    if STATE_FILE not in files:
        raise _damaged(directory, f"`{META_FILE}` does not name `{STATE_FILE}`")
    for name, recorded in files.items():
        if not is_plain_name(name):
            raise _damaged(directory, f"`{META_FILE}` names {name!r:.80}, no plain file name")
        if not isinstance(recorded, dict) or not {"size", "sha256"} <= recorded.keys():
            raise _damaged(directory, f"`{META_FILE}` lacks size or digest of `{name}`")
    return {**meta, "files": files}


def is_plain_name(name: object) -> bool:
    """Tell whether joining a name to a folder names a file in that folder."""
    if not isinstance(name, str) or name in ("", "..") or "\0" in name:
        return False
    return Path(name).name == name


def _damaged(directory: Path, reason: str) -> DataError:
    return DataError(
        f"expected a whole checkpoint in `{directory}`; {reason}. "
        "Choose another one, or let `--ckpt_path auto` find the newest whole one."
    )


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Find the newest whole checkpoint of a run; damaged ones are skipped with a logged line."""
    bring_back(checkpoints_directory(run_dir))
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
        except DataError as error:
            _logger.warning("skipping a checkpoint: %s", error)
            continue
        return path
    return None


@dataclass(frozen=True)
class BestRecord:
    """Which checkpoint of a run is the best: the content of ``best.json``.

    Attributes:
        step: Its optimizer step.
        monitor: Name of the logged value that it is the best by.
        value: That value; finite.
        mode: ``max`` if larger is better, else ``min``.
    """

    step: int
    monitor: str
    value: float
    mode: str


def read_best(run_dir: Path) -> BestRecord | None:
    """Read the record of a run's best checkpoint; None if there is none that can be read."""
    path = checkpoints_directory(run_dir) / BEST_FILE
    try:
        record = parse_json(path.read_bytes())
        return BestRecord(
            int(record["step"]), record["monitor"], float(record["value"]), record["mode"]
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _UNREADABLE as error:
        _logger.warning("ignoring `%s`, which cannot be read: %r", path, error)
        return None


def write_best(run_dir: Path, record: BestRecord) -> None:
    """Record the best checkpoint, which must have been saved already."""
    text = json.dumps(asdict(record), indent=1, allow_nan=False)
    write_text_atomic(checkpoints_directory(run_dir) / BEST_FILE, text + "\n")


def forget_best(run_dir: Path) -> None:
    """Delete the record of the best checkpoint, but not the checkpoint."""
    path = checkpoints_directory(run_dir) / BEST_FILE
    with storage_errors(path):
        path.unlink(missing_ok=True)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Find the best checkpoint of a run; one that is gone or damaged is named in a logged line."""
    record = read_best(run_dir)
    if record is None:
        return None
    bring_back(checkpoints_directory(run_dir))
    path = checkpoint_path(run_dir, record.step)
    try:
        verify_checkpoint(path)
    except DataError as error:
        _logger.warning("ignoring `%s`: %s", BEST_FILE, error)
        return None
    return path


def resolve_checkpoint(
    path: Path, *, option: str = "--ckpt_path", allows_auto: bool = True
) -> Path:
    """Find the checkpoint that a user means.

    Args:
        path: A checkpoint, a run directory, or its ``checkpoints`` directory; of the last two the
            newest whole checkpoint is meant. ``best`` in one of them, where nothing else has this
            name, is the run's best checkpoint.
        option: What the user gave it by, for the message.
        allows_auto: Whether that option takes ``auto`` too.

    Raises:
        ConfigError: If there is no checkpoint at this place.
    """
    found = _find_checkpoint(path)
    if found is not None:
        return found
    what = "nothing" if not path.exists() else "no whole checkpoint"
    if path.name == BEST_NAME and path.parent.is_dir():
        what = "no best checkpoint"
    places = [
        "a run directory",
        "a directory such as `RUN/checkpoints/step-00001000`",
        "`RUN/checkpoints/best` of a run with `checkpoint.monitor`",
    ]
    if allows_auto:
        places.append("`auto`")
    raise ConfigError(
        f"expected `{option}` to be a checkpoint or run directory; found {what} at `{path}`. "
        f"Give {', or '.join(places)}."
    )


def _find_checkpoint(path: Path) -> Path | None:
    if (path / META_FILE).is_file() or checkpoint_step(path) >= 0:
        bring_back(path.parent)
        return path if path.is_dir() else None
    if path.name == BEST_NAME and not path.exists():
        return best_checkpoint(_run_of(path.parent))
    return newest_checkpoint(_run_of(path))


def _run_of(path: Path) -> Path:
    return path.parent if path.name == "checkpoints" else path


def stored_step(checkpoint: Path) -> int:
    """Read the optimizer step that a checkpoint was taken at.

    Raises:
        DataError: If its ``state.json`` cannot be read.
    """
    try:
        return int(_read_state(checkpoint)["global_step"])
    except _UNREADABLE as error:
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
        return dict(parse_json((checkpoint / STATE_FILE).read_bytes()))
    except _UNREADABLE as error:
        raise _damaged(checkpoint, f"`{STATE_FILE}` cannot be read") from error
