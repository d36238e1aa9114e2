"""Make images of validation captions once, for all metrics of a run."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from torch.distributed.tensor import DTensor
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from segalign.data.progress import show_progress
from segalign.diffusion.generator import Weights, as_generator
from segalign.errors import ConfigError, DataError, NonFiniteError
from segalign.evaluation.captions import CaptionRow, read_caption_rows
from segalign.evaluation.curves import write_curves
from segalign.evaluation.evaluator import Evaluator, Outcome
from segalign.evaluation.history import History
from segalign.evaluation.image_metric import EvaluationSetting, ImageMetric, SourcePool
from segalign.evaluation.plan import EvaluationPlan
from segalign.evaluation.start_images import StartImages


@runtime_checkable
class CutsCaptions(Protocol):
    """A model that may not read captions to their end."""

    def caption_cuts(self, captions: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
        """Count the captions that are cut, by tokenizer, and log a line of it."""
        ...


_logger = logging.getLogger(__name__)


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
        self._said: set[str] = set()

    # When

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the start, unless this run has done so before."""
        if not self.at_start or trainer.global_step or _is_trial(trainer):
            return
        outcome = self._evaluate(trainer, pl_module, weights="raw", is_start=True)
        # Lightning logs nothing of its own before the first batch.
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": v for name, v in outcome.values.items()}, step=0)
        self._record(trainer, outcome)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, and log."""
        if trainer.sanity_checking:
            return
        outcome = self._evaluate(trainer, pl_module)
        _log(pl_module, "val", outcome.values)
        if trainer.state.fn == TrainerFn.FITTING and not _is_trial(trainer):
            self._record(trainer, outcome)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, and log."""
        values = self._evaluate(trainer, pl_module, is_final=True).values
        _log(pl_module, "test", {n: v for n, v in values.items() if not _is_detail(n)})

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the command with an error if images are missing; reports have been written.

        Raises:
            DataError: If images could not be made.
            NonFiniteError: If none is finite.
        """
        outcome = self.outcome
        if outcome is None:
            return
        if outcome.failures:
            first = outcome.failures[0]
            raise DataError(
                f"expected an image of every caption; {len(outcome.failures)} of "
                f"{outcome.setting.plan.num_images} could not be made, the first for "
                f"`{first.caption[:60]}`: {first.error}. Results are of the others; mend the "
                "captions or the model."
            )
        if not outcome.num_counted:
            raise NonFiniteError(
                f"expected finite images to evaluate; all {outcome.num_non_finite} are NaN or "
                "infinite. Use float32, or another checkpoint."
            )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where the curves are."""
        curves = _folder(trainer) / "curves.png"
        if trainer.is_global_zero and curves.is_file():
            Console().print(f"Metrics of generated images over training: {curves}", soft_wrap=True)

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
        chosen = weights or self.weights or _best_weights(pl_module)
        setting = self._setting(trainer, pl_module, chosen, is_final=is_final)
        if isinstance(pl_module, CutsCaptions) and trainer.is_global_zero:
            pl_module.caption_cuts([row["caption"] for row in setting.rows])
        observers = _observers(trainer)
        start = StartImages(_folder(trainer) / "start")
        # Rank 0 looks, so that all decide alike.
        has_start = is_start or bool(trainer.strategy.broadcast(start.is_of(setting)))
        metrics = _metrics(trainer, pl_module)
        evaluator = Evaluator(
            setting,
            metrics,
            start if has_start else None,
            bears_failures=is_final and not _is_sharded(pl_module),
        )
        title = f"evaluating {setting.plan.num_images} images"
        shown = show_progress(title, setting.plan.num_images // trainer.world_size)
        with shown if trainer.is_global_zero else contextlib.nullcontext(_ignore) as advance:
            outcome = evaluator.run(as_generator(pl_module), advance, keep_as_start=is_start)
        self.outcome = outcome
        if trainer.is_global_zero:
            self._warn(trainer, outcome)
        for observer in observers:
            observer.on_outcome(trainer, pl_module, outcome)
        return outcome

    def _setting(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Weights,
        *,
        is_final: bool,
    ) -> EvaluationSetting:
        if not self._rows:
            self._rows = read_caption_rows(Path(self._shards(trainer)), self.num_captions)
        return EvaluationSetting(
            plan=EvaluationPlan(len(self._rows), self.images_per_caption, self.batch_size),
            rows=self._rows,
            eval_seed=self.eval_seed,
            weights=weights,
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

    def _warn(self, trainer: pl.Trainer, outcome: Outcome) -> None:
        """Say what is wrong with the images, and what metrics note, each note once."""
        if outcome.num_non_finite:
            _logger.warning(
                "%d of %d images of the evaluation at step %d are not finite; metrics leave them "
                "out",
                outcome.num_non_finite,
                outcome.num_counted + outcome.num_non_finite,
                trainer.global_step,
            )
        for note in outcome.notes:
            if note not in self._said:
                self._said.add(note)
                _logger.warning("%s", note)

    def _record(self, trainer: pl.Trainer, outcome: Outcome) -> None:
        """Add an evaluation to the history of the run, and draw its curves."""
        if not trainer.is_global_zero:
            return
        history = History(_folder(trainer) / "history.jsonl")
        history.write(trainer.global_step, outcome.values)
        seen = history.read()
        wanted = self.curves or [name for name in outcome.values if name != "non_finite_images"]
        names = [name for name in wanted if any(name in values for values in seen.values())]
        if names:
            write_curves(seen, names, _folder(trainer) / "curves.png")


def _metrics(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[ImageMetric]:
    return [one for each in _observers(trainer) for one in each.metrics(trainer, pl_module)]


def _observers(trainer: pl.Trainer) -> list[ImageMetricCallback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ImageMetricCallback)]


def _is_detail(name: str) -> bool:
    """Tell whether a value is one of many of a kind, which reports draw and no log needs."""
    return "/length/" in name or name.startswith(("segment_", "chance/"))


def _log(pl_module: pl.LightningModule, stage: str, values: Mapping[str, float]) -> None:
    """Log values that are the same on every rank."""
    for name, value in values.items():
        pl_module.log(f"{stage}/{name}", value, rank_zero_only=False)


def _is_sharded(pl_module: pl.LightningModule) -> bool:
    """Tell whether ranks must make images together, so that none can try again alone."""
    return any(isinstance(weight, DTensor) for weight in pl_module.parameters())


def _best_weights(pl_module: pl.LightningModule) -> Weights:
    found: Weights = getattr(pl_module, "best_weights", "raw")
    return found


def _is_trial(trainer: pl.Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "evaluation"


def _ignore(count: int) -> None:
    """Show no progress."""
