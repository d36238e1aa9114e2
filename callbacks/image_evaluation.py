"""Make images of validation captions once, for all metrics of a run."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from callbacks.outcome_log import OutcomeLog, evaluation_folder, log_values, refuse_missing
from segalign.data.progress import show_progress
from segalign.diffusion.generator import Weights, as_generator
from segalign.errors import ConfigError
from segalign.evaluation.captions import CaptionRow, read_same_captions
from segalign.evaluation.evaluator import Evaluator, Outcome
from segalign.evaluation.image_metric import EvaluationSetting, ImageMetric, SourcePool
from segalign.evaluation.observation import observing
from segalign.evaluation.plan import EvaluationPlan
from segalign.evaluation.start_images import StartImages
from segalign.ranks import together


@runtime_checkable
class CutsCaptions(Protocol):
    """A model that may not read captions to their end."""

    def caption_cuts(self, captions: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
        """Count the captions that are cut, by tokenizer, and log a line of it."""
        ...


class ImageEvaluation(Callback):
    """Generate images at every validation, and show them to all metrics among the callbacks.

    Logs what they find as ``val/NAME``, and after ``test`` as ``test/NAME``; the run directory gets
    ``evaluation/history.jsonl`` and ``evaluation/curves.png``. Every rank makes equally many
    images, in the same micro-batches for any number of ranks. Random states, modes and weights of
    the training are left as they were.

    Args:
        num_captions: Captions of ``data.val_shards`` that are drawn, the first ones; null is all.
        images_per_caption: Images of each; diversity needs two or more.
        batch_size: Images made at a time on each rank; a multiple of ``images_per_caption``.
        eval_seed: Seed of the images' noise.
        weights: ``raw`` or ``ema``; null takes the averaged ones where the run keeps them.
        shards: Other shards to take the captions from.
        at_start: Evaluate before the first step too, and keep those images: drift is measured
            against them.
        curves: Names of the values that are drawn; null is all of them.
    """

    def __init__(
        self,
        num_captions: PositiveInt | None = 256,
        images_per_caption: PositiveInt = 1,
        batch_size: PositiveInt = 16,
        eval_seed: int = 1234,
        weights: Weights | None = None,
        shards: str | None = None,
        at_start: bool = True,
        curves: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.num_captions = num_captions
        self.images_per_caption = images_per_caption
        self.batch_size = batch_size
        self.eval_seed = eval_seed
        self.weights = weights
        self.shards = shards
        self.at_start = at_start
        self.curves = curves
        self.outcome: Outcome | None = None
        self._pool = SourcePool()
        self._rows: list[CaptionRow] = []
        self._log = OutcomeLog(curves)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to be one of several, which would share the metrics and the folder.

        Raises:
            ConfigError: If there is another.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        count = sum(isinstance(callback, ImageEvaluation) for callback in callbacks)
        if count > 1:
            raise ConfigError(
                "expected one `callbacks.image_evaluation.ImageEvaluation` in `trainer.callbacks`; "
                f"got {count}. Remove all but one, or run `main.py test` for each."
            )

    # When

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the start; or, if this run has done so before, see that metrics can be found."""
        if not self.at_start or trainer.global_step or _is_trial(trainer):
            if trainer.enable_validation:
                self._check(trainer, pl_module)
            return
        outcome = self._evaluate(trainer, pl_module, weights="raw", is_start=True)
        # Lightning logs nothing of its own before the first batch.
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": v for name, v in outcome.values.items()}, step=0)
        self._record(trainer, outcome)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that metrics can be found, before the loop of ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check(trainer, pl_module)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, and log."""
        if trainer.sanity_checking:
            return
        outcome = self._evaluate(trainer, pl_module)
        log_values(pl_module, "val", outcome.values)
        if trainer.state.fn == TrainerFn.FITTING and not _is_trial(trainer):
            self._record(trainer, outcome)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that metrics can be found, before the test's own loop."""
        self._check(trainer, pl_module, is_final=True)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, and log."""
        log_values(pl_module, "test", self._evaluate(trainer, pl_module, is_final=True).values)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the command with an error if images are missing; reports have been written.

        Raises:
            DataError: If images could not be made.
            NonFiniteError: If none is finite.
        """
        if self.outcome is not None:
            refuse_missing(self.outcome)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the curves are."""
        if trainer.is_global_zero:
            self._log.show(evaluation_folder(trainer))

    # What

    def _evaluate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        *,
        weights: Weights | None = None,
        is_start: bool = False,
        is_final: bool = False,
    ) -> Outcome:
        with observing():
            setting = self._setting(trainer, pl_module, weights, is_final=is_final)
            if isinstance(pl_module, CutsCaptions):
                captions = [row["caption"] for row in setting.rows]
                count_cuts = partial(pl_module.caption_cuts, captions)
                together(lambda: count_cuts() if trainer.is_global_zero else None)
            evaluator = Evaluator(
                setting,
                _metrics(trainer, pl_module),
                _start_images(trainer, pl_module, setting, is_start=is_start),
                bears_failures=is_final and not _is_sharded(pl_module),
            )
            title = f"evaluating {setting.plan.num_images} images"
            shown = show_progress(
                title, setting.plan.num_own(trainer.global_rank, trainer.world_size)
            )
            with shown if trainer.is_global_zero else contextlib.nullcontext(_ignore) as advance:
                outcome = evaluator.run(as_generator(pl_module), advance, keep_as_start=is_start)
            self.outcome = outcome
            if trainer.is_global_zero:
                self._log.warn(outcome, trainer.global_step)
            for observer in _observers(trainer):
                together(partial(observer.on_outcome, trainer, pl_module, outcome))
        return outcome

    def _check(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, is_final: bool = False
    ) -> None:
        """Start the metrics only, which read their networks: none may be missing hours later."""
        with observing():
            setting = self._setting(trainer, pl_module, None, is_final=is_final)
            Evaluator(setting, _metrics(trainer, pl_module)).start_metrics()

    def _setting(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Weights | None,
        *,
        is_final: bool,
    ) -> EvaluationSetting:
        if not self._rows:
            self._rows = read_same_captions(Path(self._shards(trainer)), self.num_captions)
        return EvaluationSetting(
            plan=EvaluationPlan(len(self._rows), self.images_per_caption, self.batch_size),
            rows=self._rows,
            eval_seed=self.eval_seed,
            weights=weights or self.weights or _best_weights(pl_module),
            device=torch.device(pl_module.device),
            pool=self._pool,
            is_final=is_final,
        )

    def _shards(self, trainer: pl.Trainer) -> str:
        datamodule: Any = getattr(trainer, "datamodule", None)
        found = self.shards or getattr(datamodule, "val_shards", None)
        if not found:
            raise ConfigError(
                "expected captions to evaluate on; got neither `data.val_shards` nor `shards` of "
                "ImageEvaluation. Set one of them."
            )
        return str(found)

    def _record(self, trainer: pl.Trainer, outcome: Outcome) -> None:
        """Add an evaluation to the history of the run; where rank 0 cannot, all fail."""
        record = partial(self._log.record, evaluation_folder(trainer), outcome, trainer.global_step)
        together(lambda: record() if trainer.is_global_zero else None)


def _metrics(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[ImageMetric]:
    return [one for each in _observers(trainer) for one in each.metrics(trainer, pl_module)]


def _observers(trainer: pl.Trainer) -> list[ImageMetricCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ImageMetricCallback)]


def _start_images(
    trainer: pl.Trainer, pl_module: Any, setting: EvaluationSetting, *, is_start: bool
) -> StartImages | None:
    """Name the images of the start, to be kept now, or kept before; those of other settings go."""
    size = getattr(getattr(pl_module, "generator", None), "image_size", None)
    made_by = f"{getattr(pl_module, 'sampler', None)!r}, {size} pixels"
    start = StartImages(evaluation_folder(trainer) / "start", made_by)
    # Rank 0 looks, so that all decide alike.
    has_start = is_start or bool(trainer.strategy.broadcast(start.is_of(setting)))
    return start if has_start else None


def _is_sharded(pl_module: pl.LightningModule) -> bool:
    """Tell whether ranks must make images together, so that none can try again alone."""
    return any(isinstance(weight, DTensor) for weight in pl_module.parameters())


def _best_weights(pl_module: pl.LightningModule) -> Weights:
    found: Weights = getattr(pl_module, "best_weights", "raw")
    return found


def _is_trial(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _ignore(count: int) -> None:
    """Show no progress."""
