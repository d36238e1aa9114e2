"""Let a resumed run take changed settings of its optimizer or schedule, where that is allowed."""

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from segalign.errors import ConfigError


class ChangedOptimizer(Callback):
    """Put the config's settings in the place of those that a checkpoint has restored.

    A checkpoint holds rates, decay and the schedule besides the moments, and restoring it would
    undo what was changed. The moments stay. The schedule is the new one, at the run's step, as if
    it had been followed from the first.
    """

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the settings of an optimizer and a schedule that are made anew.

        Raises:
            ConfigError: If the new schedule ends before the run's step.
        """
        fresh: Any = pl_module.configure_optimizers()
        optimizer, scheduler = _parts(fresh)
        if scheduler is not None:
            _advance(scheduler, trainer.global_step)
            for config in trainer.lr_scheduler_configs:
                config.scheduler.load_state_dict(scheduler.state_dict())
        for group, new in zip(
            trainer.optimizers[0].param_groups, optimizer.param_groups, strict=True
        ):
            group.update({name: value for name, value in new.items() if name != "params"})


def _parts(made: Any) -> tuple[Optimizer, LRScheduler | None]:
    """Take apart what `configure_optimizers` returns: an optimizer, alone or with a schedule."""
    if isinstance(made, Optimizer):
        return made, None
    if not isinstance(made, dict):
        raise ConfigError(
            "expected one optimizer and at most one schedule, whose changed settings can be taken; "
            f"got {type(made).__name__}; set them back"
        )
    schedule = made.get("lr_scheduler")
    return made["optimizer"], schedule["scheduler"] if isinstance(schedule, dict) else schedule


def _advance(scheduler: LRScheduler, num_steps: int) -> None:
    """Bring a new schedule to a step; most are defined by the step before.

    Raises:
        ConfigError: If it ends earlier.
    """
    with warnings.catch_warnings():
        # It warns that its own optimizer has made no step.
        warnings.simplefilter("ignore", UserWarning)
        try:
            for _ in range(num_steps):
                scheduler.step()
        except ValueError as error:
            raise ConfigError(
                f"expected a schedule that reaches step {num_steps}, where the run goes on; got: "
                f"{' '.join(str(error).split())}; make it longer"
            ) from error
