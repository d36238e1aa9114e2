"""Which checkpoint of a run is the best, by a value that validation logs, and its weights."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from callbacks.rank_zero import on_rank_zero
from segalign.diffusion.generator import Weights
from segalign.errors import ConfigError
from segalign.run_directory import BestRecord, best_checkpoint, forget_best, read_best, write_best
from segalign.run_format import read_tensors
from segalign.sharded_tensors import copy_into

MonitorMode = Literal["max", "min"]
_logger = logging.getLogger(__name__)


class BestValue:
    """The best of a logged value so far, kept in ``checkpoints/best.json`` too.

    Rank 0 reads values and files and tells the other ranks, so that all decide alike.

    Args:
        monitor: Name of the value, as it is logged.
        mode: Whether the largest or the smallest value is the best.
    """

    def __init__(self, monitor: str, mode: MonitorMode) -> None:
        self.monitor = monitor
        self.mode = mode
        self.value: float | None = None

    def check_validates(self, trainer: pl.Trainer) -> None:
        """Refuse a run that cannot validate.

        Raises:
            ConfigError: If it has no validation.
        """
        if not trainer.enable_validation:
            raise self._no_validation("`trainer.limit_val_batches` or the module leaves it out")
        if trainer.val_dataloaders is not None and not sum(trainer.num_val_batches):
            raise self._no_validation("there are no validation data")

    def check_schedule(self, trainer: pl.Trainer) -> None:
        """Refuse, once the data are known, a run that never validates, or in the middle of a step.

        Raises:
            ConfigError: If it is so.
        """
        self.check_validates(trainer)
        interval, batches = trainer.val_check_batch, trainer.num_training_batches
        if interval == math.inf and batches == math.inf:
            raise self._no_validation("training data that never end need `val_check_interval`")
        accumulate = trainer.accumulate_grad_batches
        if isinstance(interval, int) and interval < batches and interval % accumulate:
            raise ConfigError(
                "expected `trainer.val_check_interval` to be a multiple of "
                f"`accumulate_grad_batches` ({accumulate}) with `checkpoint.monitor`; got "
                f"{interval}, in the middle of a step. Change one of them."
            )

    def _no_validation(self, reason: str) -> ConfigError:
        return ConfigError(
            f"expected validations for `checkpoint.monitor` (`{self.monitor}`); the run has none: "
            f"{reason}. Set `trainer.val_check_interval`, `check_val_every_n_epoch: null` and "
            "validation data, or leave the monitor out."
        )

    def take_over(self, trainer: pl.Trainer, run_dir: Path) -> None:
        """Go on from the best value of an earlier attempt, if it is of the same monitor."""
        value = self._earlier_value(run_dir) if trainer.is_global_zero else None
        self.value = trainer.strategy.broadcast(value)

    def _earlier_value(self, run_dir: Path) -> float | None:
        record = read_best(run_dir)
        if record is None:
            return None
        if best_checkpoint(run_dir) is None:
            forget_best(run_dir)
            return None
        if (record.monitor, record.mode) == (self.monitor, self.mode):
            return record.value
        _logger.warning(
            "the best checkpoint so far is by `%s` (%s); the best by `%s` (%s) starts anew",
            *(record.monitor, record.mode, self.monitor, self.mode),
        )
        return None

    def look_up(self, trainer: pl.Trainer) -> float:
        """Return the value of the validation that has just ended, the same on every rank.

        Raises:
            ConfigError: If nothing of this name has been logged.
        """
        logged = trainer.callback_metrics.get(self.monitor)
        value: float | None = trainer.strategy.broadcast(None if logged is None else float(logged))
        if value is None:
            known = ", ".join(f"`{name}`" for name in sorted(trainer.callback_metrics)) or "none"
            raise ConfigError(
                f"expected `checkpoint.monitor` to name a logged value; got `{self.monitor}`. "
                f"Choose one of: {known}."
            )
        return value

    def is_beaten_by(self, value: float) -> bool:
        """Tell whether a value is the best so far; what is not finite never is."""
        if not math.isfinite(value) or self.value is None:
            return math.isfinite(value)
        return value > self.value if self.mode == "max" else value < self.value

    def keep(self, trainer: pl.Trainer, run_dir: Path, value: float) -> None:
        """Record that the checkpoint of this step, which has been saved, is the best so far.

        Raises:
            StorageError: On every rank, if rank 0 cannot write it; the best is then as before.
        """
        record = BestRecord(trainer.global_step, self.monitor, value, self.mode)
        on_rank_zero(trainer, partial(write_best, run_dir, record))
        self.value = value


@contextlib.contextmanager
def stored_weights(module: nn.Module, checkpoint: Path, weights: Weights) -> Iterator[None]:
    """Put a checkpoint's trained weights into a module for the duration of a block.

    The module's own weights return bit for bit, also if the block raises.

    Args:
        module: The module that the checkpoint is of.
        checkpoint: The checkpoint.
        weights: Its raw weights, or its averaged ones with the raw buffers.

    Raises:
        DataError: If the checkpoint does not hold them.
    """
    stored = [read_tensors(checkpoint / "model.safetensors")]
    if weights == "ema":
        stored.append(read_tensors(checkpoint / "ema.safetensors"))
    own = module.state_dict()
    before = {name: own[name].clone() for name in stored[0] if name in own}
    try:
        for state in stored:
            _copy_into(own, state)
        yield
    finally:
        _copy_into(own, before)


def _copy_into(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if name in own:
            copy_into(own[name], tensor)
