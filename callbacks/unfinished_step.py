"""What follows a step's checkpoint, and is made up for where a stop has cut it off."""

import json
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.kept_rows import flush_logs
from segalign.atomic import write_text_atomic
from segalign.data.accounts import RunAccounts
from segalign.json_text import parse_json
from segalign.run_directory import checkpoint_step, checkpoints_directory

_DUE = "validation_due"
_FILE = "followed.json"
_VALIDATED, _ENDED, _PASSES = "validated", "ended", "passes"


class UnfinishedStep:
    """The validation after a step's checkpoint, and the end of the training after the last one.

    A checkpoint is taken before both, and says whether a validation is due. What has followed is
    noted in the run directory's ``checkpoints/followed.json``; so a resumed run knows what a stop
    has cut off, does it once, and logs it at the step where it belongs. The accounts of the data of
    a validation are kept there, too.

    Attributes:
        is_due: Whether a validation follows the step that was just taken.
    """

    def __init__(self) -> None:
        self.is_due = False
        self._owed_step: int | None = None
        self._max_steps: int | None = None

    # Before a stop

    def note_step_end(self, trainer: pl.Trainer) -> None:
        """See whether a validation follows."""
        fetcher: Any = trainer.fit_loop._data_fetcher
        self.is_due = bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))

    def store(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint whether a validation is due, and log the step that it ends with."""
        checkpoint[_DUE] = self.is_due
        _log_step(trainer)

    def note_validated(self, trainer: pl.Trainer, run_dir: Path, passes: Mapping[str, Any]) -> None:
        """Record on rank 0 that the validation of this step is done.

        Args:
            trainer: Has validated.
            run_dir: The run directory.
            passes: The validation's counts; see ``passes_of``.
        """
        _note(trainer, run_dir, {_VALIDATED: trainer.global_step, _PASSES: passes})

    def note_ended(self, trainer: pl.Trainer, run_dir: Path) -> None:
        """Record on rank 0 that the training ended at this step, with all that belongs to it."""
        _note(trainer, run_dir, {_ENDED: trainer.global_step})

    # After it

    def load(self, trainer: pl.Trainer, run_dir: Path, checkpoint: dict[str, Any]) -> None:
        """See what a stop has cut off after the checkpoint that a run of this directory resumes."""
        if trainer.state.fn != TrainerFn.FITTING or _DUE not in checkpoint:
            return
        step = int(checkpoint["global_step"])
        if not _is_of(run_dir, trainer.ckpt_path):
            return
        followed = trainer.strategy.broadcast(_read(run_dir) if trainer.is_global_zero else {})
        # Validations come in the order of their steps: one of a later step is of this one too.
        if checkpoint[_DUE] and followed.get(_VALIDATED, -1) < step:
            self._owed_step = step
        elif followed.get(_VALIDATED, -1) >= step and (accounts := _accounts(trainer)) is not None:
            accounts.take_passes(followed[_PASSES])
        if 0 <= trainer.max_steps <= step and followed.get(_ENDED) != step:
            # Lightning does not even begin a training that has no step left.
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = step + 1

    def make_up(self, trainer: pl.Trainer) -> None:
        """Begin a step anew that was cut off; validate, if that was, as the training loop does."""
        loop = trainer.fit_loop.epoch_loop
        _begin_step_anew(trainer)
        if self._max_steps is not None:
            loop.max_steps, self._max_steps = self._max_steps, None
        if self._owed_step is None or self._owed_step != trainer.global_step:
            return
        self._owed_step = None
        self.is_due = True
        connector = trainer._logger_connector
        is_first = connector._first_loop_iter
        trainer.validating = True
        loop.val_loop.restarting = False
        num_before = copy(loop.val_loop.batch_progress.total)
        loop.val_loop.run()
        # Going on, the loop itself counts the batches of a validation that is due at its start.
        loop.val_loop.batch_progress.total = num_before
        trainer.training = True
        connector._first_loop_iter = is_first


def passes_of(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the counts of the validation that was just done; all ranks must call it.

    The step's checkpoint, which was taken before, has not got them.
    """
    accounts = _accounts(trainer)
    return {} if accounts is None else accounts.passes()


def _accounts(trainer: pl.Trainer) -> RunAccounts | None:
    accounts = getattr(trainer.datamodule, "accounts", None)  # type: ignore[attr-defined]
    return accounts if isinstance(accounts, RunAccounts) else None


def _log_step(trainer: pl.Trainer) -> None:
    """Log what a step has measured before it is saved; the loop itself does so only afterwards.

    A run that goes on from the checkpoint repeats later steps alone, so that a kill between the two
    would leave a hole in the logs.
    """
    connector = trainer._logger_connector
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    is_in_batch = trainer.training and progress.completed < progress.processed
    name = "update_train_step_metrics"
    if not is_in_batch or name in vars(connector):
        return
    connector.update_train_step_metrics()
    logged = set(connector.metrics["log"])

    def log_rest() -> None:
        """Take the place of the loop's own call, once: what was measured since then."""
        delattr(connector, name)
        rest = {key: value for key, value in connector.metrics["log"].items() if key not in logged}
        if rest and connector.should_update_logs:
            connector.log_metrics(rest)

    setattr(connector, name, log_rest)


def _begin_step_anew(trainer: pl.Trainer) -> None:
    """Count micro-batches from the first one of the next optimizer step on.

    So a step is whole that a stop has cut off between two micro-batches, and so are the steps of a
    run that goes on with another ``accumulate_grad_batches``: Lightning counts on from the number
    of micro-batches that it has had. The data starts at a whole step in any case.
    """
    module = trainer.lightning_module
    is_endless = trainer.fit_loop.max_batches == float("inf")
    if not (module.automatic_optimization and trainer.global_step and is_endless):
        return
    num_batches = trainer.global_step * trainer.accumulate_grad_batches
    progress = trainer.fit_loop.epoch_loop.batch_progress
    counts: Any
    for counts in (progress.total, progress.current):
        num_behind = counts.processed - counts.completed
        counts.ready = counts.started = counts.processed = num_batches
        counts.completed = num_batches - num_behind


def forget_later(run_dir: Path, start: Path | None) -> None:
    """Forget what has followed steps that are taken once more, or of another run."""
    step = checkpoint_step(start) if start is not None and _is_of(run_dir, start) else 0
    followed = _read(run_dir)
    kept = dict(followed)
    if kept.get(_ENDED, 0) > step:
        del kept[_ENDED]
    if kept.get(_VALIDATED, 0) > step:
        kept[_VALIDATED] = step
    if not step:
        kept[_PASSES] = {}
    if kept != followed:
        _write(run_dir, kept)


def _note(trainer: pl.Trainer, run_dir: Path, events: Mapping[str, Any]) -> None:
    # A resumed run does not repeat what is noted here, nor its rows.
    flush_logs(trainer)
    _write(run_dir, {**_read(run_dir), **events})


def _is_of(run_dir: Path, checkpoint: Any) -> bool:
    own = checkpoints_directory(run_dir).resolve()
    return checkpoint is not None and Path(checkpoint).resolve().parent == own


def _read(run_dir: Path) -> dict[str, Any]:
    """Read the record; one that is missing or damaged knows nothing."""
    try:
        record = parse_json((checkpoints_directory(run_dir) / _FILE).read_bytes())
        passes = dict(record.pop(_PASSES, {}))
        return {**{str(event): int(step) for event, step in record.items()}, _PASSES: passes}
    except (OSError, ValueError, TypeError, AttributeError):
        return {_PASSES: {}}


def _write(run_dir: Path, followed: Mapping[str, Any]) -> None:
    path = checkpoints_directory(run_dir) / _FILE
    write_text_atomic(path, json.dumps(followed) + "\n")
