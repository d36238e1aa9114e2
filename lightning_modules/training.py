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
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.strategy_checks import check_strategy
from lightning_modules.text_totals import TextTotals
from segalign.diffusion.generator import Weights
from segalign.ema import TrainableEMA
from segalign.errors import ConfigError, NonFiniteError, SegalignError
from segalign.gradients import average_gradients, clip_gradient_values, clip_gradients
from segalign.sharding import copy_from_first_rank, data_parallel_mesh, is_sharded
from segalign.text.conditioning import TextReport
from segalign.trainable import trainable_parameters
from segalign.types import CaptionBatch, PreferenceBatch

_logger = logging.getLogger(__name__)
_TEXT_TOTALS = "text_totals"
_MAX_NAMED = 5


class TrainingModule(pl.LightningModule):
    """Base of the training modules.

    A loss is the sum over the valid samples of an optimizer step, over all ranks and micro-batches,
    divided by their number. Micro-batches divide by their own size; the gradient is corrected
    before the optimizer step, in the rare step that has invalid samples.

    Args:
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.
    """

    def __init__(
        self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.strict_loading = False
        self.ema: TrainableEMA | None = None
        self._num_samples = 0
        self._counts: Tensor | None = None
        self._bad_samples: list[tuple[Tensor, Tensor]] = []
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
        valid: Tensor = batch["valid"]
        is_bad = valid & ~losses.detach().isfinite()
        counts = torch.stack([valid.sum(), is_bad.sum()])
        self._num_samples += len(valid)
        self._counts = counts if self._counts is None else self._counts + counts
        self._bad_samples.append((batch["sample_ids"], is_bad))
        return torch.where(valid, losses, 0).sum() / len(valid)

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
        if self.device_mesh is None or not gradient_clip_val:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
            return
        clip = clip_gradient_values if gradient_clip_algorithm == "value" else clip_gradients
        clip(list(trainable_parameters(self).values()), gradient_clip_val)

    def finish_reduction(self) -> None:
        """Turn the mean over all samples into the mean over valid ones.

        Raises:
            NonFiniteError: On every rank, if a loss of any rank was not finite.
        """
        if self._counts is None:
            return
        counts = self.trainer.strategy.reduce(self._counts.float(), reduce_op="sum")
        assert isinstance(counts, Tensor)
        num_valid, num_bad = counts.tolist()
        if num_bad:
            raise self.bad_samples_error(int(num_bad))
        num_samples = self._num_samples * self.trainer.world_size
        for parameter in trainable_parameters(self).values():
            if parameter.grad is not None:
                # Two whole numbers, so that the correction is exact in the gradient's own dtype.
                parameter.grad.mul_(num_samples).div_(max(num_valid, 1))
        self._num_samples, self._counts = 0, None
        self._bad_samples.clear()
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step % every == 0:
            self._log_text_totals()

    def bad_samples_error(self, num_bad: int) -> SegalignError:
        """Name the samples of this rank whose losses were not finite, before any weight moves."""
        own = torch.cat([ids[is_bad] for ids, is_bad in self._bad_samples]).tolist()
        names = ", ".join(map(str, own[:_MAX_NAMED])) or "none of this rank"
        return NonFiniteError(
            f"expected finite losses at step {self.global_step}; got NaN or infinity for {num_bad} "
            f"samples ({names}{', ...' if len(own) > _MAX_NAMED else ''}){self.what_failed()}; no "
            "weight was changed; look at these samples, or lower the learning rate"
        )

    def what_failed(self) -> str:
        """Say more of a loss that was not finite, in parentheses; here: nothing."""
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

    def _log_text_totals(self, *, ended: bool = False) -> None:
        """Log the epochs that are over; every rank comes here at the same step."""

        def reduce(counts: Tensor, operation: str) -> Tensor:
            reduced = self.trainer.strategy.reduce(counts.to(self.device), reduce_op=operation)
            assert isinstance(reduced, Tensor)
            return reduced

        for epoch, totals in self.text_totals.flush(reduce, ended=ended).items():
            metrics = {f"epoch/{name}": float(count) for name, count in totals.items()}
            for logger in self.loggers:
                logger.log_metrics({"epoch/index": float(epoch), **metrics}, self.global_step)

    @override
    def on_train_end(self) -> None:
        self._log_text_totals(ended=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._log_text_totals()
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
