"""Skip steps whose losses or gradients are not finite, and end a run that has too many."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from segalign.errors import NonFiniteError
from segalign.skipped_steps import (
    LOG_NAME,
    SkipCounter,
    SkippedStep,
    append,
    forget_from,
    skipped_step,
)

_logger = logging.getLogger(__name__)


class NonFiniteSteps(Callback):
    """Count the optimizer steps that were skipped, and end the run when there are too many.

    Training modules skip a step on all ranks if a reward, a loss or the gradient of any is not
    finite, and warn: weights, the optimizer's state and averages stay as they are; data, learning
    rate and the count of steps move on. Here each gets a line in ``RUN/logs/skipped_steps.jsonl``,
    with step, reason and sample ids; the metric ``train/skipped_steps``, how many there were so
    far, is logged from the first one on. The counts are part of a checkpoint.

    Args:
        max_in_a_row: So many skipped steps in a row end the run, with exit code 70.
        max_share: Largest share of skipped steps among the last ``window`` ones, in [0, 1]; more
            end the run, too. Younger runs may have as many as those of ``window`` steps; 1 does not
            look at the share.
        window: Steps that ``max_share`` looks back on.
    """

    def __init__(
        self,
        max_in_a_row: PositiveInt = 10,
        max_share: ClosedUnitInterval = 0.01,
        window: PositiveInt = 1000,
    ) -> None:
        super().__init__()
        self.counter = SkipCounter(max_in_a_row, max_share, window)
        self._seen_step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count optimizer steps from here; later ones in the log are of a stopped attempt."""
        self._seen_step = trainer.global_step
        self._keep_log(trainer, partial(forget_from, step=trainer.global_step))

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the optimizer step that was just taken, if one was.

        Raises:
            NonFiniteError: On every rank, if too many were skipped.
        """
        if trainer.global_step > self._seen_step:
            self._seen_step = trainer.global_step
            self._count(trainer, skipped_step(pl_module))
        if self.counter.total:
            pl_module.log("train/skipped_steps", float(self.counter.total))

    def _count(self, trainer: pl.Trainer, skipped: SkippedStep | None) -> None:
        self.counter.add(trainer.global_step - 1, is_skipped=skipped is not None)
        if skipped is None:
            return
        self._keep_log(trainer, partial(append, skipped=skipped))
        if (found := self.counter.too_many()) is not None:
            raise NonFiniteError(
                f"expected finite losses and gradients; got {found}, the last of them {skipped}; "
                f"look at the samples in logs/{LOG_NAME}, lower the learning rate, train in "
                "float32, or raise `non_finite.max_in_a_row` or `non_finite.max_share`; weights "
                "can be spoilt before anything is infinite: if a resumed run ends so again, start "
                "anew in another `--run_dir`"
            )

    def _keep_log(self, trainer: pl.Trainer, write: Callable[[Path], None]) -> None:
        """Write to the log; a run goes on without it, rather than that one rank ends alone."""
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        path = Path(trainer.default_root_dir) / "logs" / LOG_NAME
        try:
            write(path)
        except OSError as error:
            _logger.warning("`%s` is not complete: %s", path, error)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the counts, so that a resumed run counts on."""
        return self.counter.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved counts."""
        self.counter.load_state_dict(state_dict)
