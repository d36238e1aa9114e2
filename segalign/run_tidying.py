"""What is deleted of a run's checkpoints: the old ones, and what killed processes have left.

Pure standard library, as ``segalign.run_directory``.
"""

import logging
from pathlib import Path

from segalign.atomic import recover_directory, remove_directory
from segalign.errors import DataError
from segalign.run_directory import (
    checkpoint_step,
    checkpoints_directory,
    list_checkpoints,
    read_best,
    verify_checkpoint,
)

_logger = logging.getLogger(__name__)


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete what is older than the newest ``keep`` whole checkpoints of a run, but for the best.

    Were damaged ones counted too, nothing that can be read might be left. Files are not read for
    it: one whose bytes have changed, but not their number, passes for whole.
    """
    best = read_best(run_dir)
    num_whole = 0
    for path in reversed(list_checkpoints(run_dir)):
        if num_whole < keep:
            num_whole += _seems_whole(path)
        elif best is None or checkpoint_step(path) != best.step:
            remove_directory(path)


def remove_stale(run_dir: Path) -> None:
    """Remove what a killed process left unfinished among a run's checkpoints."""
    parent = checkpoints_directory(run_dir)
    if not parent.is_dir():
        return
    for stale in recover_directory(parent):
        _logger.warning("removed an unfinished checkpoint: %s", stale)


def _seems_whole(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint, digests=False)
    except DataError:
        return False
    return True
