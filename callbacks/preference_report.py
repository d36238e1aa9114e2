"""Evaluate the scorer of a preference model: retrieval, and accuracy on preference pairs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from segalign.errors import ConfigError, DataError
from segalign.metrics.pair_accuracy import PairResult
from segalign.metrics.pair_buckets import ALL
from segalign.metrics.pair_report import PairTables
from segalign.metrics.report_table import wide_console
from segalign.metrics.retrieval import CUTOFFS, DIRECTIONS, RetrievalResult
from segalign.metrics.retrieval_report import RetrievalTables
from segalign.metrics.scorer_evaluation import EvaluationSettings, ScorerEvaluation
from segalign.metrics.text_readings import AVERAGE, SINGLE
from segalign.rewards.common_direction import CorpusDirection
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.text.segmenter import Segmenter
from segalign.types import CaptionBatch, PreferenceBatch

_SUFFIXES = {"text_to_image": "", "image_to_text": "_image_to_text"}


class PreferenceReport(Callback):
    """Log how well the scorer of a module ranks; after ``test``, write tables and plots.

    Works with any module that has ``scorer``, a ``SegmentScorer``. Batches of images are ranked;
    preference pairs are counted. Validation logs ``val/r_at_1`` and its kin and
    ``val/pair_accuracy`` with its buckets. ``test`` logs the same as ``test/...``, and writes
    ``retrieval`` and ``pair_accuracy``, each as ``.md``, ``.csv`` and ``.png``, to the run
    directory. docs/evaluation.md defines every number.

    Args:
        gallery_size: Samples of a retrieval gallery; null ranks all in one.
        max_segments: Retrieval by the mean of the first so many segments, in ``test`` only.
        segmenter: Splits captions; null takes the scorer's strategy, or sentences if it has none.
        common_direction: File of the direction V, for the commands ``validate`` and ``test``; null,
            and validation in training, estimates V from the ranked captions.
        retrieval_on_preferred: Rank the preferred images of preference pairs too.
    """

    def __init__(
        self,
        gallery_size: PositiveInt | None = None,
        max_segments: Sequence[PositiveInt] = (1, 2, 3, 4, 6, 8),
        segmenter: Segmenter | None = None,
        common_direction: str | None = None,
        retrieval_on_preferred: bool = False,
    ) -> None:
        super().__init__()
        self.gallery_size = gallery_size
        self.max_segments = tuple(max_segments)
        self.segmenter = segmenter
        self.common_direction = common_direction
        self.retrieval_on_preferred = retrieval_on_preferred
        self._direction: str | None = None
        self._evaluation: ScorerEvaluation | None = None

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew; the trainer's sanity check is not evaluated."""
        # The text weights of a fit change, so that a direction estimated before is another model's.
        self._direction = None if trainer.state.fn == TrainerFn.FITTING else self.common_direction
        self._evaluation = None if trainer.sanity_checking else self._start(pl_module, ())

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew, with all numbers of segments."""
        self._direction = self.common_direction
        self._evaluation = self._start(pl_module, self.max_segments)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: CaptionBatch | PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Encode a batch; padded rows are encoded, but not counted."""
        if self._evaluation is not None:
            _update(self._evaluation, batch, dataloader_idx)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: CaptionBatch | PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Encode a batch; padded rows are encoded, but not counted."""
        assert self._evaluation is not None
        _update(self._evaluation, batch, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather from all ranks and log."""
        if self._evaluation is not None:
            self._finish(pl_module, "val")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather from all ranks, log and write the report."""
        tables = self._finish(pl_module, "test")
        if not trainer.is_global_zero:
            return
        console = wide_console()
        weights = _weights_of(trainer)
        for report in [one.report() for one in tables]:
            report = replace(report, facts=f"{weights} {report.facts}")
            console.print(report.facts)
            for table in report.tables:
                console.print(table.to_rich())
            paths = report.write(Path(trainer.default_root_dir))
            console.print("Written:", ", ".join(map(str, paths)), soft_wrap=True)

    def _start(
        self, pl_module: pl.LightningModule, max_segments: tuple[int, ...]
    ) -> ScorerEvaluation:
        path = self._direction
        settings = EvaluationSettings(
            max_segments=max_segments,
            gallery_size=self.gallery_size,
            segmenter=self.segmenter,
            common_direction=None if path is None else CorpusDirection.load(Path(path)),
            retrieval_on_preferred=self.retrieval_on_preferred,
        )
        return ScorerEvaluation(_scorer_of(pl_module), settings)

    def _finish(
        self, pl_module: pl.LightningModule, stage: str
    ) -> list[RetrievalTables | PairTables]:
        """Compute on every rank, log, and forget the features."""
        evaluation, self._evaluation = self._evaluation, None
        assert evaluation is not None
        given = None if self._direction is None else f"read from `{self._direction}`"
        tables: list[RetrievalTables | PairTables] = []
        values: dict[str, float] = {}
        if evaluation.retrieval is not None:
            found: RetrievalResult = evaluation.retrieval.compute()
            source = given or "estimated from the ranked captions, for each reading"
            ranked = RetrievalTables(found, evaluation.readings, source)
            values |= retrieval_values(ranked, evaluation.own_reading)
            tables.append(ranked)
        if evaluation.pairs is not None:
            counted: PairResult = evaluation.pairs.compute()
            pairs = PairTables(counted, evaluation.ways, given)
            values |= pair_values(pairs, evaluation.own_reading)
            tables.append(pairs)
        for name, value in values.items():
            shown = name in ("r_at_1", "pair_accuracy")
            pl_module.log(f"{stage}/{name}", value, prog_bar=shown, rank_zero_only=False)
        return tables


def retrieval_values(tables: RetrievalTables, own_reading: str) -> dict[str, float]:
    """Name the numbers of retrieval that are logged; the plain names are of the own reading."""
    values = {
        f"r_at_{cutoff}{suffix}": tables.recall("C", own_reading, direction, cutoff)
        for direction, suffix in _SUFFIXES.items()
        for cutoff in CUTOFFS
    }
    for reading in (SINGLE, AVERAGE):
        for part, suffix in (("C", ""), ("C_perp", "_text_relevant")):
            name = f"r_at_1_{reading}{suffix}"
            values[name] = tables.recall(part, reading, DIRECTIONS[0], 1)
    return values


def pair_values(tables: PairTables, own_reading: str) -> dict[str, float]:
    """Name the accuracies that are logged; those by bucket are of the own reading."""
    values = {
        f"pair_accuracy/{bucket}": tables.accuracy(("C", own_reading), bucket)
        for bucket in tables.buckets()
    }
    values["pair_accuracy"] = values.pop(f"pair_accuracy/{ALL}")
    for part, reading in tables.ways:
        suffix = "" if part == "C" else "_text_relevant"
        values[f"pair_accuracy_{reading}{suffix}"] = tables.accuracy((part, reading), ALL)
    return values


def _scorer_of(module: object) -> SegmentScorer:
    scorer = getattr(module, "scorer", None)
    if not isinstance(scorer, SegmentScorer):
        raise ConfigError(
            f"PreferenceReport expects a module with a `scorer` (SegmentScorer); "
            f"`{type(module).__name__}` has none; remove the callback"
        )
    return scorer


def _update(
    evaluation: ScorerEvaluation, batch: CaptionBatch | PreferenceBatch, dataloader_idx: int
) -> None:
    if dataloader_idx > 0:
        raise DataError(
            "PreferenceReport expects one loader, whose sample ids are one data set's; got "
            f"loader {dataloader_idx + 1}; evaluate one data set at a time"
        )
    evaluation.update(batch)


def _weights_of(trainer: pl.Trainer) -> str:
    """Say which weights are tested."""
    if trainer.ckpt_path is None:
        return "Weights: those that the config starts from (no `--ckpt_path` was given)."
    checkpoint = Path(trainer.ckpt_path)
    return f"Weights: {checkpoint.name} of {checkpoint.parent.parent.name}."
