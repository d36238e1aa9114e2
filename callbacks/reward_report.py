"""Before and after: what reward fine-tuning has changed, as a table and a picture."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from callbacks.before_after import is_written, show_written_report, write_report
from callbacks.best_checkpoint import stored_weights
from callbacks.caption_rows import own_places, read_first_captions
from callbacks.report_figures import Figures, RankFigures, change_table
from callbacks.stored_images import as_stored, read_image, write_image
from segalign.atomic import make_directory
from segalign.data.progress import show_progress
from segalign.diffusion.generator import ImageGenerator, Weights
from segalign.errors import ConfigError
from segalign.evaluation.captions import CaptionRow
from segalign.pictures import Panel
from segalign.ranks import gather_objects
from segalign.run_directory import best_checkpoint, checkpoint_step, read_best

# From places of rows to their images, ``(B, 3, H, W)``; all ranks ask for equally many.
_Images = Callable[[Sequence[int]], Tensor]
_logger = logging.getLogger(__name__)


@runtime_checkable
class ImageScorer(ImageGenerator, Protocol):
    """An image generator that scores images by the rewards that it is trained or watched by."""

    @property
    def best_weights(self) -> Weights:
        """The weights that the module is judged by: averaged ones where the run keeps them."""
        ...

    def score_images(
        self, images: Tensor, captions: Sequence[str], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Score images.

        Args:
            images: Float in [0, 1], ``(B, 3, H, W)``; rewards of images that are not finite are
                NaN.
            captions: ``B`` captions.
            valid: Which rows are no padding, bool ``(B,)``; None is all.

        Returns:
            Rewards ``(B,)`` by name: ``reward``, its parts as ``reward/NAME``, and rewards that
            are not trained on as ``held_out/NAME``.
        """
        ...


class RewardReport(Callback):
    """Score what the model makes of validation captions before and after training, and print both.

    Images of the first validation captions are scored by ``pl_module.score_images``; where the
    captions state facts of scenes, the oracle says too how many are shown. If the run keeps a best
    checkpoint (``checkpoint.monitor``), that is scored as well. The table is ``report.md`` in the
    run directory, the picture ``report.png``. The ranks share the captions.

    Rewards may learn in training. So images of the start wait in ``report/before`` of the run
    directory, and all are scored at the end, by the same rewards, rounded to 8 bits as files are.

    Args:
        num_captions: Validation captions that are scored.
        num_pictures: Prompts in the picture.
        batch_size: Images made at once, on each rank.
        eval_seed: Seed of the images' noise.
        weights: Weights that are scored after training; null takes those that validation does, the
            averaged ones where the run keeps them.
    """

    def __init__(
        self,
        num_captions: PositiveInt = 96,
        num_pictures: PositiveInt = 6,
        batch_size: PositiveInt = 16,
        eval_seed: int = 1234,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.num_captions = num_captions
        self.num_pictures = num_pictures
        self.batch_size = batch_size
        self.eval_seed = eval_seed
        self.weights = weights
        self.figures: dict[str, Figures] = {}
        self.best_step: int | None = None
        self._rows: list[CaptionRow] = []

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the start, unless a checkpoint says that it has been drawn."""
        if self._rows or getattr(trainer, "fast_dev_run", False):
            return
        model = _as_scorer(pl_module)
        if trainer.global_step and trainer.is_global_zero:
            _logger.warning("the report's `before` is of step %d, not 0", trainer.global_step)
        rows = read_first_captions(trainer, self.num_captions)
        self._draw_before(trainer, model, rows)
        self._rows = rows

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the start, the trained model, and the best checkpoint."""
        if self._rows:
            self._score_all(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report; a run that was finished before repeats it, or makes it up."""
        run_dir = Path(trainer.default_root_dir)
        written = trainer.strategy.broadcast(is_written(run_dir))
        if self._rows and "after" not in self.figures and not written:
            # The trainer has put the module away by now.
            pl_module.to(trainer.strategy.root_device)
            self._score_all(trainer, pl_module)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        if "after" in self.figures:
            table = change_table(self._columns())
            write_report(run_dir, table, self._panels(), facts=self._facts(pl_module, run_dir))
        elif written:
            show_written_report(run_dir)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Say that the start has been drawn, and of which captions."""
        return {"rows": self._rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    # Images

    def _draw_before(
        self, trainer: pl.Trainer, model: ImageScorer, rows: Sequence[CaptionRow]
    ) -> None:
        """Store images of the start; each rank its own."""
        folder = _before_folder(trainer)
        make_directory(folder)
        draw = self._generated(model, rows, "raw")
        for batch in self._batches(trainer, len(rows), "drawing the start"):
            for place, image in zip(batch, draw(batch), strict=True):
                if place < len(rows):
                    write_image(_image_path(folder, place), image)

    def _generated(
        self, model: ImageScorer, rows: Sequence[CaptionRow], weights: Weights
    ) -> _Images:
        def generate(places: Sequence[int]) -> Tensor:
            own = [rows[min(place, len(rows) - 1)] for place in places]
            captions, ids = [row["caption"] for row in own], [row["sample_id"] for row in own]
            return as_stored(model.generate(captions, ids, self.eval_seed, weights))

        return generate

    def _stored(self, trainer: pl.Trainer, device: torch.device) -> _Images | None:
        """Read the images of the start; None on every rank, and a warning, if one is missing."""
        folder, last = _before_folder(trainer), len(self._rows) - 1
        own = [place for place in own_places(trainer, last + 1) if place <= last]
        # What others own is there once they have come here.
        missing = sum(gather_objects(sum(not _image_path(folder, one).is_file() for one in own)))
        if missing:
            if trainer.is_global_zero:
                _logger.warning(
                    "the report has no `before`: %d of %d images in `%s` are missing",
                    *(missing, last + 1, folder),
                )
            return None

        def read(places: Sequence[int]) -> Tensor:
            paths = [_image_path(folder, min(place, last)) for place in places]
            return torch.stack([read_image(path) for path in paths]).to(device)

        return read

    # Scoring

    def _score_all(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the start, the last weights and those of the best checkpoint, perhaps the last."""
        model = _as_scorer(pl_module)
        weights = self.weights or model.best_weights
        if (before := self._stored(trainer, pl_module.device)) is not None:
            self.figures["before"] = self._score(trainer, model, "the start", before)
        after = self._generated(model, self._rows, weights)
        self.figures["after"] = self._score(trainer, model, "the trained model", after)
        own = best_checkpoint(Path(trainer.default_root_dir)) if trainer.is_global_zero else None
        best: Path | None = trainer.strategy.broadcast(own)
        if best is not None:
            self.best_step = checkpoint_step(best)
            self.figures["best"] = self.figures["after"]
            if self.best_step != trainer.global_step:
                of_best = self._generated(model, self._rows, "raw")
                with stored_weights(pl_module, best, weights):
                    title = f"the best checkpoint, {best.name}"
                    self.figures["best"] = self._score(trainer, model, title, of_best)
        if trainer.is_global_zero and (found := self._non_finite()):
            _logger.warning("images of the report are not finite: %s", found)

    def _score(
        self, trainer: pl.Trainer, model: ImageScorer, what: str, images_of: _Images
    ) -> Figures:
        """Score one set of images; every rank scores equally many."""
        part = RankFigures(self._rows, self.num_pictures)
        for batch in self._batches(trainer, len(self._rows), f"scoring {what}"):
            images = images_of(batch)
            captions = [self._rows[min(place, len(self._rows) - 1)]["caption"] for place in batch]
            is_own = torch.tensor([place < len(self._rows) for place in batch])
            rewards = model.score_images(images, captions, is_own.to(images.device))
            part.add(batch, images, rewards)
        return part.join()

    def _batches(self, trainer: pl.Trainer, count: int, what: str) -> Iterator[range]:
        """Cut this rank's places into batches, without gradient, and show how far it is."""
        places = own_places(trainer, count)
        progress = show_progress(what, len(places)) if trainer.is_global_zero else None
        with progress or contextlib.nullcontext(_ignore) as advance, torch.no_grad():
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                yield batch
                advance(len(batch))

    # Writing

    def _columns(self) -> dict[str, Figures | None]:
        columns = {"before": self.figures.get("before"), "after": self.figures["after"]}
        if "best" in self.figures:
            columns[f"best (step {self.best_step})"] = self.figures["best"]
        return columns

    def _panels(self) -> list[Panel]:
        columns = [name for name in ("before", "after", "best") if name in self.figures]
        pictures = zip(*(self.figures[name].pictures / 255 for name in columns), strict=True)
        captions = [row["caption"] for row in self._rows]
        return [
            Panel(list(row), columns, caption)
            for row, caption in zip(pictures, captions, strict=False)
        ]

    def _facts(self, pl_module: pl.LightningModule, run_dir: Path) -> str:
        """Say what was measured, and what the best checkpoint is the best by."""
        weights = self.weights or _as_scorer(pl_module).best_weights
        text = (
            f"Means over images of the first {len(self._rows)} validation captions; noise of seed "
            f"{self.eval_seed}; {'averaged' if weights == 'ema' else 'raw'} weights."
        )
        if found := self._non_finite():
            text = f"{text} Means of rewards leave out images that are not finite: {found}."
        record = read_best(run_dir)
        if "best" not in self.figures or record is None:
            return text
        return f"{text} The best checkpoint has the {record.mode}imum of `{record.monitor}`."

    def _non_finite(self) -> str:
        """Count images that are not finite, by moment; nothing if all are."""
        found = {name: figures.num_non_finite for name, figures in self.figures.items()}
        return ", ".join(f"{count} of `{name}`" for name, count in found.items() if count)


def _before_folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "report" / "before"


def _image_path(folder: Path, place: int) -> Path:
    return folder / f"{place:05d}.png"


def _as_scorer(module: object) -> ImageScorer:
    if not isinstance(module, ImageScorer):
        raise ConfigError(
            "RewardReport expects a module that generates and scores images; got "
            f"`{type(module).__name__}`. Remove the callback."
        )
    return module


def _ignore(count: int) -> None:
    """Show no progress."""
