"""Write what a test has found: numbers with their protocol, a table row, plots, a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from jsonargparse.typing import NonNegativeInt, PositiveInt
from typing_extensions import override

from callbacks.image_metric import ImageMetricCallback
from callbacks.outcome_log import evaluation_folder
from segalign.evaluation.evaluator import Outcome
from segalign.evaluation.image_metric import ImageMetric
from segalign.evaluation.kept_images import KeptImages
from segalign.evaluation.result import EvaluationResult
from segalign.evaluation.result_files import make_result, write_result
from segalign.evaluation.result_table import compare
from segalign.metrics.report_table import ReportTable, wide_console
from segalign.run_directory import META_FILE, file_digest


@runtime_checkable
class Described(Protocol):
    """A module that says what it evaluates."""

    def description(self) -> Mapping[str, Any]:
        """Return plain data; ``name`` is what tables call it."""
        ...


class EvaluationReport(ImageMetricCallback):
    """After ``test``, print a table and write ``evaluation/test`` in the run directory.

    ``result.json`` has all numbers with their protocols, seeds and the digest of the prompts;
    ``result.md`` a row for a table; ``images.jsonl`` every image's values; ``result.html`` a page
    with images, each with the scores of its caption's segments; ``images`` those of the page as
    files, which the report of a study sets side by side; and there are plots by length.

    Args:
        num_pictures: Captions whose images are on the page.
        images_of_each: Images of each of them.
        name: What tables call the model; null is its own name.
    """

    def __init__(
        self,
        num_pictures: NonNegativeInt = 16,
        images_of_each: PositiveInt = 2,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.num_pictures = num_pictures
        self.images_of_each = images_of_each
        self.name = name
        self._kept = KeptImages(num_pictures, images_of_each) if num_pictures else None

    @override
    def make_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Sequence[ImageMetric]:
        return [] if self._kept is None else [self._kept]

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep Lightning's own table back: it has the same numbers, and more of them."""
        trainer.test_loop.verbose = False

    @override
    def on_outcome(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outcome: Outcome
    ) -> None:
        """Write the files; other ranks have the same numbers."""
        if not outcome.setting.is_final or not trainer.is_global_zero:
            return
        folder = evaluation_folder(trainer) / "test"
        result = self._result(_describe(trainer, pl_module), outcome)
        images = {} if self._kept is None else self._kept.images
        write_result(folder, result, outcome.setting.rows, outcome.findings, images)
        console = wide_console()
        console.print(_upright(compare([result])).to_rich())
        console.print(
            f"All numbers, images and plots: {folder / 'result.html'}", soft_wrap=True, markup=False
        )

    def _result(self, model: Mapping[str, Any], outcome: Outcome) -> EvaluationResult:
        return make_result(
            outcome.setting,
            outcome.findings,
            {**model, "name": self.name or model["name"]},
            num_counted=outcome.num_counted,
            num_non_finite=outcome.num_non_finite,
            failures=outcome.failures,
            seconds=outcome.making_seconds + outcome.metric_seconds,
        )


def _upright(table: ReportTable) -> ReportTable:
    """Turn a table of one row into one of two columns, which fits any terminal."""
    (first, *headings), (name, *cells) = table.headings, table.rows[0]
    rows = [list(pair) for pair in zip(headings, cells, strict=True)]
    return ReportTable(table.title, [first, name], rows)


def _describe(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Any]:
    """Say what was evaluated: what the module says, or the checkpoint that was loaded."""
    if isinstance(pl_module, Described):
        return pl_module.description()
    checkpoint = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
    return {
        "name": Path(trainer.default_root_dir).name,
        "kind": type(pl_module).__name__,
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "digest": None if checkpoint is None else file_digest(checkpoint / META_FILE),
        "sampler": repr(getattr(pl_module, "sampler", None)),
    }
