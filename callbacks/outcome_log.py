"""Where an evaluation's findings go: loggers, warnings, the history of a run and its curves."""

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console

from segalign.errors import DataError, NonFiniteError
from segalign.evaluation.curves import write_curves
from segalign.evaluation.evaluator import Outcome
from segalign.evaluation.history import History

_logger = logging.getLogger(__name__)


def evaluation_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of a run directory for what evaluations leave."""
    return Path(trainer.default_root_dir) / "evaluation"


class OutcomeLog:
    """Says what evaluations have found, and keeps it in the run directory.

    Args:
        curves: Names of the values that are drawn; None is all of them.
    """

    def __init__(self, curves: Sequence[str] | None = None) -> None:
        self.curves = curves
        self._said: set[str] = set()

    def warn(self, outcome: Outcome, step: int) -> None:
        """Say what is wrong with the images, and what metrics note, each note once."""
        if outcome.num_non_finite:
            _logger.warning(
                "%d of %d images of the evaluation at step %d are not finite; metrics leave them "
                "out",
                outcome.num_non_finite,
                outcome.num_counted + outcome.num_non_finite,
                step,
            )
        for note in outcome.notes:
            if note not in self._said:
                self._said.add(note)
                _logger.warning("%s", note)

    def record(self, folder: Path, outcome: Outcome, step: int) -> None:
        """Add an evaluation to the history in a folder, and draw its curves."""
        history = History(folder / "history.jsonl")
        history.write(step, outcome.values)
        seen = history.read()
        wanted = self.curves or [name for name in outcome.values if name != "non_finite_images"]
        names = [name for name in wanted if any(name in values for values in seen.values())]
        if names:
            write_curves(seen, names, folder / "curves.png")

    def show(self, folder: Path) -> None:
        """Say where the curves are, if there are any."""
        curves = folder / "curves.png"
        if curves.is_file():
            text = f"Metrics of generated images over training: {curves}"
            Console().print(text, soft_wrap=True, markup=False)


def log_values(pl_module: pl.LightningModule, stage: str, values: Mapping[str, float]) -> None:
    """Log values that are the same on every rank; a test's without those that reports draw."""
    for name, value in values.items():
        if stage != "test" or not _is_detail(name):
            key = f"{stage}/{name}"
            # Lightning would advise to average over ranks what is equal already.
            advice = re.escape(f"It is recommended to use `self.log({key!r}")
            warnings.filterwarnings("ignore", message=advice)
            pl_module.log(key, value, rank_zero_only=False)


def refuse_missing(outcome: Outcome) -> None:
    """End a test with an error if images are missing; reports have been written.

    Raises:
        DataError: If images could not be made.
        NonFiniteError: If none is finite.
    """
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


def _is_detail(name: str) -> bool:
    """Tell whether a value is one of many of a kind, which reports draw and no log needs."""
    return "/length/" in name or name.startswith(("segment_", "chance/"))
