"""Which checkpoint ``--ckpt_path`` means, to all ranks alike."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from segalign.errors import ConfigError, DataError
from segalign.ranks import gather_objects
from segalign.run_directory import best_checkpoint, newest_checkpoint, resolve_checkpoint


class SameCheckpoint(Callback):
    """Compare, before any rank loads it, the checkpoints that the ranks have found by themselves.

    Args:
        found: What this rank has found.
    """

    def __init__(self, found: Path | None) -> None:
        super().__init__()
        self._found = found

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Meet the other ranks, who have started by now.

        Raises:
            DataError: If one of them has found another checkpoint, or none.
        """
        found = gather_objects("none" if self._found is None else f"`{self._found.name}`")
        if len(set(found)) == 1:
            return
        kinds = [
            f"{name} on {found.count(name)} of them, first on rank {found.index(name)}"
            for name in dict.fromkeys(found)
        ]
        raise DataError(
            f"expected all {len(found)} ranks to find the same checkpoint; got {', '.join(kinds)}. "
            "Perhaps a file system has shown some of them an old listing: start again."
        )


def find_checkpoint(
    wanted: object, subcommand: str, run_dir: Path, *, starts_over: bool
) -> Path | None:
    """Find the checkpoint that a subcommand starts from.

    Args:
        wanted: ``auto``, ``best``, a path, or None.
        subcommand: Such as ``fit``.
        run_dir: The run directory, for ``auto`` and ``best``.
        starts_over: Whether ``fit`` deletes what is there, so that ``auto`` starts anew.

    Returns:
        The checkpoint; None to start from what the config says.

    Raises:
        ConfigError: If it is not there, or if ``fit`` is given ``best``.
    """
    if wanted is None:
        return None
    if str(wanted) == "best":
        return _best(subcommand, run_dir)
    if str(wanted) != "auto":
        return resolve_checkpoint(Path(str(wanted)))
    if subcommand == "fit" and starts_over:
        return None
    found = newest_checkpoint(run_dir)
    if found is None and subcommand != "fit":
        raise ConfigError(
            f"expected a checkpoint for `--ckpt_path auto`; found none in `{run_dir}`. "
            f"Train first, or give a checkpoint to `{subcommand}`."
        )
    return found


def _best(subcommand: str, run_dir: Path) -> Path:
    if subcommand == "fit":
        raise ConfigError(
            "expected `auto` or a path for `--ckpt_path` of `fit`; got `best`, which is for "
            "evaluation. To train on from a best checkpoint, give its path, "
            "`RUN/checkpoints/best`, and another `--run_dir`."
        )
    found = best_checkpoint(run_dir)
    if found is None:
        raise ConfigError(
            f"expected a best checkpoint for `--ckpt_path best`; found none in `{run_dir}`. "
            "Train with `--checkpoint.monitor NAME`, or give `--ckpt_path auto`."
        )
    return found
