"""What becomes of the checkpoints that a run directory holds when training starts in it.

Pure standard library, as ``segalign.run_directory``.
"""

import logging
from pathlib import Path

from segalign.atomic import remove_directory, storage_errors
from segalign.errors import ConfigError, DataError
from segalign.run_directory import (
    checkpoint_step,
    checkpoints_directory,
    forget_best,
    list_checkpoints,
    read_best,
    stored_step,
    verify_checkpoint,
)

_logger = logging.getLogger(__name__)


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

    A renamed checkpoint is neither found nor pruned any more. The record of the best checkpoint
    goes first if it names one of them, so that it never names one that is gone.
    """
    superseded = superseded_checkpoints(run_dir, start)
    best = read_best(run_dir)
    if best is not None and best.step in map(checkpoint_step, superseded):
        forget_best(run_dir)
    for path in superseded:
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
