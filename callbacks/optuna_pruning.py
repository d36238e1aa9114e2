"""Let a searcher stop a run that falls behind its other trials."""

import logging
import signal as signals
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from callbacks.preemption import keep_handlers, let_children_end
from callbacks.signal_flag import ignore
from segalign.errors import PrunedError, SegalignError
from segalign.launch.searching.trial_storage import (
    TrialRecord,
    import_optuna,
    open_trial,
    read_trial,
)

_logger = logging.getLogger(__name__)


class OptunaPruning(Callback):
    """Report each validation to Optuna, and stop where Optuna's own callback would.

    That one decides, on rank 0. Around it is done what it lacks: it counts epochs, of which long
    streams have one, so it is given steps; it refuses several ranks unless trials are in a
    relational database, so the other ranks are told here; and a run outlives its searcher, so
    trouble with trials is a warning.

    A validation's own callbacks all end first. The run stops before the next batch; one that has
    none left ends as any other.

    The run's trial is named in its directory; a run without one goes on to its end.

    Args:
        search: Name of the search. It is here so that searches do not share runs, which others of
            the search may have stopped.
        monitor: What validation logs and the search compares.
    """

    def __init__(self, search: str, monitor: str) -> None:
        super().__init__()
        self.search = search
        self.monitor = monitor
        self._judge: Any = None
        self._is_behind = False
        self._said: set[str] = set()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the run's trial.

        Raises:
            ConfigError: If Optuna is not installed.
        """
        import_optuna("optuna_integration")
        self._is_behind = False
        self._judge = None
        record = read_trial(Path(trainer.default_root_dir)) if trainer.is_global_zero else None
        if record is not None:
            self._judge = self._open_judge(record)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask, on rank 0, whether this run falls behind; all ranks learn it."""
        is_behind = self._judge is not None and self._ask(trainer)
        self._is_behind = trainer.strategy.broadcast(is_behind)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the run, on all ranks alike, if it has fallen behind.

        Raises:
            PrunedError: If so, on rank 0.
            SystemExit: If so, on the others, which say nothing and end with the same code.
        """
        if not self._is_behind:
            return
        if trainer.world_size > 1:
            _end_together(trainer)
        if not trainer.is_global_zero:
            raise SystemExit(PrunedError.exit_code)
        raise PrunedError(
            f"pruned by the searcher at step {trainer.global_step}: by `{self.monitor}`, "
            "other trials do better."
        )

    def _open_judge(self, record: TrialRecord) -> Any:
        integration = import_optuna("optuna_integration")
        try:
            trial = open_trial(record)
        except SegalignError as error:
            self._warn(f"this run cannot be pruned: {error}")
            return None
        return integration.PyTorchLightningPruningCallback(trial, self.monitor)

    def _ask(self, trainer: pl.Trainer) -> bool:
        if self.monitor not in trainer.callback_metrics:
            self._warn(f"this run cannot be pruned yet: validation logs no `{self.monitor}`")
            return False
        optuna = import_optuna()
        stepwise: Any = SimpleNamespace(current_epoch=trainer.global_step)
        try:
            with warnings.catch_warnings():
                # A resumed run reports once more what it has reported before.
                warnings.simplefilter("ignore")
                self._judge.on_validation_end(trainer, stepwise)
        except optuna.TrialPruned:
            return True
        # Whatever a database raises: hours of training are worth more than a trial's number.
        except Exception as error:  # noqa: BLE001
            self._warn(f"this run cannot be pruned: its searcher does not answer: {error}")
        return False

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _logger.warning("%s", text)


def _end_together(trainer: pl.Trainer) -> None:
    """Keep a rank that has ended from having the others killed, by Lightning or by ``srun``."""
    ignore(signals.SIGTERM)
    keep_handlers(trainer)
    let_children_end(trainer)
    trainer.strategy.barrier()
