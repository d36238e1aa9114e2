"""What callbacks that measure generated images share: an evaluation asks them for metrics."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.evaluation.evaluator import Outcome
from segalign.evaluation.image_metric import ImageMetric


@runtime_checkable
class MakesImages(Protocol):
    """The callback that makes the images."""

    num_captions: int | None
    images_per_caption: int


class ImageMetricCallback(Callback):
    """Base of callbacks that bring metrics to the evaluation of a run.

    They make no image themselves: `callbacks.image_evaluation.ImageEvaluation` does, once for all
    of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._metrics: list[ImageMetric] | None = None

    @abstractmethod
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        """Make the metrics; their networks are read when the first evaluation starts."""

    def metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[ImageMetric]:
        """Return the metrics, the same ones at every evaluation."""
        if self._metrics is None:
            self._metrics = list(self.make_metrics(trainer, pl_module))
        return self._metrics

    def on_outcome(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outcome: Outcome,
    ) -> None:
        """Look at what all metrics have found; here: nothing."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse to wait for images that nobody makes.

        Raises:
            ConfigError: If nothing makes images.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, MakesImages) for callback in callbacks):
            raise ConfigError(
                f"expected `callbacks.image_evaluation.ImageEvaluation`, which makes the images "
                f"that `{type(self).__name__}` measures, in `trainer.callbacks`; got none. Add it."
            )
