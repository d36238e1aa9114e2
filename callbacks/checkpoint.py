"""Checkpoints in the run format: when they are written, and how Lightning reads them back."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from callbacks.best_checkpoint import BestValue, MonitorMode
from callbacks.failed_saves import FailedSaves, save_on_rank_zero
from callbacks.kept_rows import flush_logs
from callbacks.rank_zero import on_rank_zero
from callbacks.unfinished_step import UnfinishedStep, forget_later, passes_of
from segalign.atomic import make_directory, remove_directory
from segalign.errors import ConfigError
from segalign.run_directory import checkpoint_path, checkpoints_directory
from segalign.run_format import load_checkpoint, save_checkpoint
from segalign.run_start import check_start, clear_superseded
from segalign.run_tidying import prune_checkpoints, remove_stale
from segalign.trainable import trainable_parameters, trainable_state_dict

_HYPER_PARAMETERS = (
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    "datamodule_hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hparams_type",
)
_logger = logging.getLogger(__name__)


class SafetensorsCheckpointIO(CheckpointIO):
    """Write Lightning's checkpoint dict as a directory of safetensors and JSON.

    Stored hyper-parameters are left out: the config alone says how a model is built.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        tree = {key: value for key, value in checkpoint.items() if key not in _HYPER_PARAMETERS}
        save_checkpoint(tree, Path(path))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        remove_directory(Path(path))


class RunCheckpoint(Checkpoint):
    """Save a run every few optimizer steps and when training ends.

    Only what is trained is saved; frozen weights come from where the config says. A checkpoint is
    taken at the end of an optimizer step, before a validation at the same step, so that a resumed
    run goes on with the very next batch; if it was stopped before that validation had ended, it
    makes up for it first. With ``monitor``, the best checkpoint is kept besides:
    ``checkpoints/best.json`` names it, and ``--ckpt_path best`` evaluates it.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        keep: How many of the newest checkpoints to keep, at least 2: were the newest damaged, the
            one before it could still be used.
        overwrite: Start over in a run directory that holds checkpoints, which are deleted, with
            ``ckpt_path: auto`` too. With another ``ckpt_path``, go on from there and delete those
            checkpoints of the run directory that are later or of another run.
        monitor: Name of a logged value, such as ``val/loss``, that is looked at after each
            validation; where it is the best so far, a checkpoint of that very step is kept.
        monitor_mode: ``max`` if larger is better, else ``min``.
        max_failed_saves: So many periodic checkpoints in a row may find no room on the disk, each
            told in a warning, before the run ends. The last checkpoint of a run, and that of a
            signal, never fail in silence.
        allow_changes: Settings of a resumed run, such as ``model.init_args.max_grad_norm``, that
            may differ from those of its checkpoint, alone or with what lies below them. It is
            looked at before anything is built.

    Raises:
        ConfigError: If ``keep`` is below 2.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 1000,
        keep: PositiveInt = 2,
        overwrite: bool = False,
        monitor: str | None = None,
        monitor_mode: MonitorMode = "max",
        max_failed_saves: NonNegativeInt = 0,
        allow_changes: list[str] | None = None,
    ) -> None:
        super().__init__()
        if keep < 2:
            raise ConfigError(f"expected `checkpoint.keep` >= 2; got {keep}. Set it to 2 or more.")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.overwrite = overwrite
        self._run_dir = Path()
        self.allow_changes = allow_changes or []
        self._failures = FailedSaves(max_failed_saves)
        self._saved_step = self._tried_step = 0
        self._saved_path: Path | None = None
        self._seen_step = 0
        self._at_step_end = False
        self._best = None if monitor is None else BestValue(monitor, monitor_mode)
        self._unfinished = UnfinishedStep()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the run directory; frozen weights are absent, so loading cannot be strict."""
        self._run_dir = Path(trainer.default_root_dir)
        pl_module.strict_loading = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tidy up after a killed attempt, and refuse to mix two runs in one directory."""
        if getattr(trainer, "fast_dev_run", False):
            return
        if self._best is not None:
            self._best.check_validates(trainer)
        start = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        if not self.overwrite:
            check_start(self._run_dir, start)
        on_rank_zero(trainer, partial(self._tidy, start))
        if self._best is not None:
            self._best.take_over(trainer, self._run_dir)

    def _tidy(self, start: Path | None) -> None:
        make_directory(checkpoints_directory(self._run_dir))
        remove_stale(self._run_dir)
        clear_superseded(self._run_dir, start, delete=self.overwrite)
        forget_later(self._run_dir, start)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count optimizer steps from here, after the validation that a stop has cut off."""
        self._saved_step = self._tried_step = self._seen_step = trainer.global_step
        self._saved_path = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        if self._best is not None:
            self._best.check_schedule(trainer)
        self._unfinished.make_up(trainer)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save when an optimizer step has just been taken and a checkpoint is due."""
        step = trainer.global_step
        self._at_step_end, self._seen_step = step > self._seen_step, step
        self._unfinished.is_due = False
        if self._at_step_end:
            self._unfinished.note_step_end(trainer)
        is_last = step == trainer.max_steps
        is_due = step // self.every_n_steps > self._tried_step // self.every_n_steps
        if step > self._saved_step and (is_due or is_last):
            self._save(trainer, may_fail=not is_last)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a checkpoint of this step if the monitored value is the best so far."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        was_due, self._unfinished.is_due = self._unfinished.is_due, False
        if self._best is not None:
            self._keep_if_best(trainer, self._best)
        if was_due and not getattr(trainer, "fast_dev_run", False):
            passes = passes_of(trainer)
            note = partial(self._unfinished.note_validated, trainer, self._run_dir, passes)
            self._failures.forgive(trainer, partial(on_rank_zero, trainer, note))

    def _keep_if_best(self, trainer: pl.Trainer, best: BestValue) -> None:
        value = best.look_up(trainer)
        if getattr(trainer, "fast_dev_run", False) or not best.is_beaten_by(value):
            return
        is_new = trainer.global_step > self._saved_step
        if not (self._at_step_end if is_new else self._saved_path):
            _logger.warning("no checkpoint of the best value: a step was under way")
            return
        if is_new and not self._save(trainer, may_fail=True):
            return
        if self._failures.forgive(trainer, partial(best.keep, trainer, self._run_dir, value)):
            self._prune(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was trained since the last checkpoint, whatever ended the training."""
        self._unfinished.is_due = False
        if trainer.global_step > self._saved_step:
            self._save(trainer)
        if self._best is not None and self._best.value is None and trainer.is_global_zero:
            _logger.warning(
                "there is no best checkpoint: no validation ended with a finite `%s`",
                self._best.monitor,
            )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that the training has ended, once the module has logged its last rows."""
        if not getattr(trainer, "fast_dev_run", False):
            on_rank_zero(trainer, partial(self._unfinished.note_ended, trainer, self._run_dir))

    def save_step(self, trainer: pl.Trainer) -> Path | None:
        """Save the last optimizer step, unless that is done; all ranks must call it together.

        It may be called at the end of a training batch, after this callback, and in a validation.

        Returns:
            The checkpoint of this step; None if there is none and the next step is under way.
        """
        if trainer.global_step > self._saved_step:
            if not self._at_step_end:
                return None
            self._save(trainer)
        return self._saved_path

    def _save(self, trainer: pl.Trainer, *, may_fail: bool = False) -> bool:
        """Save this step; return whether it is saved."""
        if getattr(trainer, "fast_dev_run", False):
            return False
        step = self._tried_step = trainer.global_step
        path = checkpoint_path(self._run_dir, step)
        save = partial(save_on_rank_zero, trainer, path)
        if not may_fail:
            save()
        elif not self._failures.tolerate(trainer, save):
            return False
        self._saved_step, self._saved_path = step, path
        self._prune(trainer)
        return True

    def _prune(self, trainer: pl.Trainer) -> None:
        on_rank_zero(trainer, self._try_to_prune)

    def _try_to_prune(self) -> None:
        try:
            prune_checkpoints(self._run_dir, self.keep)
        except OSError as error:
            _logger.warning("old checkpoints stay for now: %s", error)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the last rows of the logs, where a full disk ends all ranks alike."""
        on_rank_zero(trainer, partial(flush_logs, trainer))

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave frozen weights out, and say whether a validation is due."""
        checkpoint["state_dict"] = trainable_state_dict(pl_module, checkpoint["state_dict"])
        self._unfinished.store(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that every trainable weight was in the checkpoint; loading itself is not strict."""
        _check_loaded(pl_module, checkpoint["state_dict"])
        self._unfinished.load(trainer, self._run_dir, checkpoint)


def _check_loaded(pl_module: pl.LightningModule, state: Mapping[str, Any]) -> None:
    missing = sorted(trainable_parameters(pl_module).keys() - state.keys())
    if missing:
        raise ConfigError(
            f"expected the checkpoint to hold every trained weight; {len(missing)} are missing, "
            f"`{missing[0]}` first. Use the model settings of the run that wrote it."
        )
    known = dict(pl_module.named_parameters(remove_duplicate=False)) | dict(
        pl_module.named_buffers(remove_duplicate=False)
    )
    unknown = sorted(state.keys() - known.keys())
    if unknown:
        _logger.warning(
            "%d weights of the checkpoint are not in the model, `%s` first",
            len(unknown),
            unknown[0],
        )
