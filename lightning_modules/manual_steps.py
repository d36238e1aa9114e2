"""Optimizer steps of a module that makes its gradient by several backward passes."""

import contextlib
from collections.abc import Sequence
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.training import TrainingModule
from segalign.gradients import clip_gradients


def local_backward(strategy: Strategy) -> contextlib.AbstractContextManager[None]:
    """Keep ranks from averaging at every backward pass of a block: they do it once, at the end."""
    if not isinstance(strategy, ParallelStrategy):
        return contextlib.nullcontext()
    return cast("contextlib.AbstractContextManager[None]", strategy.block_backward_sync())


def is_logging(module: pl.LightningModule) -> bool:
    """Tell whether Lightning logs the step that is being made."""
    every = int(module.trainer.log_every_n_steps)  # type: ignore[attr-defined]
    return every > 0 and (module.global_step + 1) % every == 0


def the_optimizer(module: pl.LightningModule) -> LightningOptimizer:
    """Return the one optimizer of a module."""
    return cast("LightningOptimizer", module.optimizers())


def step_optimizer(
    module: TrainingModule, trained: Sequence[nn.Parameter], max_norm: float | None
) -> Tensor:
    """Clip the gradient, and step the optimizer and the learning rate.

    A step that is skipped is counted too, and moves the learning rate, but has no gradient.

    Args:
        module: The module, with one optimizer and at most one schedule; its reduction is finished.
        trained: Its trained weights, their gradients averaged over ranks.
        max_norm: Longest gradient; None leaves it as it is.

    Returns:
        The norm of the gradient before clipping, a scalar; NaN if the step is skipped.
    """
    norm = clip_gradients(trained, max_norm)
    the_optimizer(module).step()
    if (schedule := module.lr_schedulers()) is not None:
        cast("LRScheduler", schedule).step()
    return norm if module.skipped is None else torch.full_like(norm, torch.nan)
