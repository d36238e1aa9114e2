"""What training modules share: optimizers, shards, and exact means over valid samples."""

import contextlib
import logging
from collections.abc import Mapping
from itertools import chain
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.step_samples import StepSamples, correct_mean
from lightning_modules.strategy_checks import check_strategy
from lightning_modules.text_totals import TextTotals
from segalign.diffusion.generator import Weights
from segalign.ema import TrainableEMA
from segalign.errors import ConfigError
from segalign.gradients import average_gradients, clip_gradient_values, clip_gradients
from segalign.sharding import copy_from_first_rank, data_parallel_mesh, is_sharded
from segalign.skipped_steps import (
    RankFinding,
    SkippedStep,
    agree_on_skip,
    bad_gradients,
    drop_gradients,
)
from segalign.text.conditioning import TextReport
from segalign.trainable import trainable_parameters
from segalign.types import CaptionBatch, PreferenceBatch

_logger = logging.getLogger(__name__)
_TEXT_TOTALS = "text_totals"


class TrainingModule(pl.LightningModule):
    """Base of the training modules.

    A loss is the sum over the valid samples of an optimizer step, over all ranks and micro-batches,
    divided by their number. Micro-batches divide by their own size; the gradient is corrected
    before the optimizer step, in the rare step that has invalid samples. A step whose losses or
    gradient are not finite, on whichever rank, is skipped by all: neither weights nor the
    optimizer's state change, and ``skipped`` says why.

    Args:
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.

    Attributes:
        skipped: The last optimizer step, if it was skipped; the same on all ranks.
        is_left_out: Whether that step changed nothing: skipped, or left out by float16's scaler.
    """

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.strict_loading = False
        self.ema: TrainableEMA | None = None
        self._samples = StepSamples()
        self.skipped: SkippedStep | None = None
        self.is_left_out = False
        self.text_totals = TextTotals()
        self._warned_of_lost_text = False

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(list(trainable_parameters(self).values()))
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @override
    def configure_callbacks(self) -> list[Any]:
        """Refuse strategies that this module cannot follow, before weights are read."""
        check_strategy(self.trainer)
        return []

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the networks that are trained; they are in their final shape. Here: nothing.

        Args:
            mesh: The ranks, one-dimensional.
        """

    def share_weights(self) -> None:
        """End `configure_model`: under a strategy that shards, agree with other ranks, and shard.

        What is trained and not sharded is whole on every rank, as under DDP.

        Raises:
            ConfigError: If there is nothing to shard.
        """
        if self.device_mesh is None:
            return
        mesh = data_parallel_mesh(self.device_mesh)
        self.shard(mesh)
        if not is_sharded(self):
            raise ConfigError(
                "expected layers to share out over the ranks; got none that are trained; leave "
                "configs/base/fsdp.yaml out, for configs/base/ddp.yaml"
            )
        for part in self.children():
            if any(weight.requires_grad for weight in part.parameters()):
                copy_from_first_rank(chain(part.parameters(), part.buffers()), mesh)

    @override
    def train(self, mode: bool = True) -> Self:
        """Switch modes, but for parts that are wholly frozen: those always evaluate."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    @override
    def on_fit_start(self) -> None:
        """Look at the weights once more: a trainer of low precision has cast them all."""
        self.check_trained_precision()

    def check_trained_precision(self) -> None:
        """Refuse to train weights that small updates would round away from.

        Raises:
            ConfigError: If a trained weight is not float32 (or float64).
        """
        for name, parameter in trainable_parameters(self).items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"expected trained weights in float32; `{name}` is {parameter.dtype}; set the "
                    "base's `dtype` to float32, or train a LoRA over it; and let "
                    "`trainer.precision` be `32-true` or `bf16-mixed`"
                )

    def reduce_losses(self, losses: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Reduce per-sample losses ``(B,)`` for backward, and count the valid and the bad ones."""
        self._samples.add(losses, batch)
        return torch.where(batch["valid"], losses, 0).sum() / len(losses)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Correct the gradient, unless a module that steps its optimizer itself has done so."""
        # A strategy that shards leaves to the module what is whole, be it everything.
        if self.automatic_optimization and self.device_mesh is not None:
            average_gradients(trainable_parameters(self).values())
        self.finish_reduction()

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all shards, or by value, where the strategy shards."""
        if self.skipped is not None:
            return  # without gradients, and not all of torch's ways to clip take none
        if self.device_mesh is None or not gradient_clip_val:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
            return
        clip = clip_gradient_values if gradient_clip_algorithm == "value" else clip_gradients
        clip(list(trainable_parameters(self).values()), gradient_clip_val)

    def finish_reduction(self) -> None:
        """Turn the mean over all samples into the mean over valid ones, or skip the step.

        If a loss of any rank, or the gradient of all, is not finite, every rank drops its gradient,
        so that the optimizer changes nothing, and ``skipped`` says what was found.

        Raises:
            SegalignError: On every rank, if no later step would be better.
        """
        samples, self._samples = self._samples, StepSamples()
        self.text_totals.commit()
        if samples.counts is None:
            return
        trained = trainable_parameters(self)
        num_rows = samples.num_rows * self.trainer.world_size
        # Of all ranks: no rank may decide for itself, or the others would wait for it.
        norm = clip_gradients(list(trained.values()), None).detach()
        is_bad = ~(norm * num_rows).isfinite().to(samples.counts.device)
        found = torch.cat([samples.counts, is_bad.view(1)]).float()
        num_valid, num_bad, num_bad_gradients = self._reduce(found, "sum").tolist()
        self.skipped, self.is_left_out = None, bool(num_bad or num_bad_gradients)
        if num_bad or (num_bad_gradients and not self._is_scale_to_blame()):
            self._skip_step(samples, trained)
        correct_mean(trained.values(), num_rows, int(num_valid))
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step % every == 0:
            self._log_text_totals()

    def _reduce(self, counts: Tensor, operation: str) -> Tensor:
        reduced = self.trainer.strategy.reduce(counts.to(self.device), reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    def _is_scale_to_blame(self) -> bool:
        """Tell whether float16's loss scale is so large yet that finite losses may overflow.

        Its scaler leaves out such a step by itself, and tries a smaller scale in the next.
        """
        return (scaler := self._scaler) is not None and scaler.get_scale() > 1

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _skip_step(self, samples: StepSamples, trained: Mapping[str, Parameter]) -> None:
        """Agree with the other ranks on what is wrong, and let nothing come of this step."""
        self.refuse_batch()
        detail, gradients = self.what_failed(), bad_gradients(trained)
        own = RankFinding(samples.bad_ids(), samples.ids(), detail, gradients)
        self.skipped = agree_on_skip(self.global_step, own)
        is_fused = getattr(self.trainer.optimizers[0], "_step_supports_amp_scaling", False)
        drop_gradients(trained, are_scaled=is_fused and self._scaler is not None)
        if self.trainer.is_global_zero:
            _logger.warning("skipped on all ranks, %s", self.skipped)

    def refuse_batch(self) -> None:
        """Look at a step whose numbers are not finite; all ranks come here. Here: nothing.

        Raises:
            SegalignError: On every rank, if no later step would be better.
        """

    def what_failed(self) -> str:
        """Say more of what was not finite on this rank; here: nothing."""
        return ""

    def report_text(self, report: TextReport, batch: CaptionBatch) -> None:
        """Log how much text of a training batch did not fit; say so the first time."""
        self.text_totals.add(report, batch["epochs"].tolist(), batch["valid"].tolist())
        totals = report.totals()
        for name in ("dropped_tokens", "cut_segments"):
            self.log(f"train/{name}", float(totals[name]), batch_size=len(batch["valid"]))
        if totals["dropped_tokens"] and not self._warned_of_lost_text:
            self._warned_of_lost_text = True
            _logger.warning(
                "%d of %d text tokens of a batch do not fit the text encoding; see "
                "epoch/dropped_tokens; raise `text.token_budget` (of T5: `text.t5.token_budget`), "
                "or use `kind: segments` if it is `truncated`",
                totals["dropped_tokens"],
                totals["kept_tokens"] + totals["dropped_tokens"],
            )

    def _log_text_totals(self, step: int | None = None, *, ended: bool = False) -> None:
        """Log the epochs that are over; every rank comes here at the same step."""
        step = self.global_step if step is None else step
        for epoch, totals in self.text_totals.flush(self._reduce, ended=ended).items():
            metrics = {f"epoch/{name}": float(count) for name, count in totals.items()}
            for logger in self.loggers:
                logger.log_metrics({"epoch/index": float(epoch), **metrics}, step)

    @override
    def on_train_end(self) -> None:
        self._log_text_totals(ended=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # As of the step just taken: a run that goes on from here repeats all rows but its own.
        self._log_text_totals(max(self.global_step - 1, 0))
        checkpoint[_TEXT_TOTALS] = self.text_totals.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        self.text_totals.load_state_dict(checkpoint.get(_TEXT_TOTALS, {}))

    def log_train(self, name: str, value: Tensor, batch: CaptionBatch | PreferenceBatch) -> None:
        """Log a training value, also on the progress bar."""
        self.log(f"train/{name}", value, prog_bar=True, batch_size=len(batch["valid"]))

    def weights(self, which: Weights) -> contextlib.AbstractContextManager[None]:
        """Use the raw or the averaged weights for the duration of a block.

        Raises:
            ConfigError: If there is no average.
        """
        if which == "raw":
            return contextlib.nullcontext()
        if self.ema is None:
            raise ConfigError(
                "expected averaged weights for `ema`; the run keeps none. Add callbacks.ema.EMA."
            )
        return self.ema.swapped(self)
