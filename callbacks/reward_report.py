"""Before and after: what reward fine-tuning has changed, as a table and a picture."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from callbacks.caption_rows import (
    CaptionRow,
    gather_objects,
    have_facts,
    own_places,
    read_first_captions,
)
from segalign.data.progress import show_progress
from segalign.diffusion.generator import ImageGenerator, Weights
from segalign.errors import ConfigError
from segalign.metrics.report_table import ReportTable
from segalign.pictures import Panel
from segalign.run_directory import best_checkpoint, checkpoint_step, read_best
from segalign.scenes.evaluation import SceneScore
from segalign.scenes.world import get_world
from segalign.text.tokenizer import clip_tokenizer

# Names of the oracle's accuracies, and what the table calls them.
FACTS = {
    "attributes": "facts shown: attributes",
    "attributes/within_77": "facts shown: attributes within 77 tokens",
    "attributes/past_77": "facts shown: attributes past token 77",
    "objects": "facts shown: objects",
}
_logger = logging.getLogger(__name__)


@runtime_checkable
class ImageScorer(ImageGenerator, Protocol):
    """An image generator that scores images by the rewards that it is trained or watched by."""

    def score_images(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Score images.

        Args:
            images: Float in [0, 1], ``(B, 3, H, W)``.
            captions: ``B`` captions.

        Returns:
            Rewards ``(B,)`` by name: ``reward``, its parts as ``reward/NAME``, and rewards that
            are not trained on as ``held_out/NAME``.
        """
        ...


@dataclass(frozen=True, eq=False)
class Figures:
    """What one set of weights scores.

    Attributes:
        values: Means over the captions, by the table's names, in its order.
        pictures: Of the first captions, uint8 ``(P, 3, H, W)``.
    """

    values: dict[str, float]
    pictures: Tensor


class RewardReport(Callback):
    """Score the model on validation captions before and after training, and print both.

    Images of the first validation captions are scored by ``pl_module.score_images``; where the
    captions state facts of scenes, the oracle says too how many are shown. If the run keeps a best
    checkpoint (``checkpoint.monitor``), that is scored as well. The table is ``report.md`` in the
    run directory, the picture ``report.png``. The ranks share the captions.

    Args:
        num_captions: Validation captions that are scored.
        num_pictures: Prompts in the picture.
        batch_size: Images made at once, on each rank.
        eval_seed: Seed of the images' noise.
        weights: Weights that are scored after training.
    """

    def __init__(
        self,
        num_captions: PositiveInt = 96,
        num_pictures: PositiveInt = 6,
        batch_size: PositiveInt = 16,
        eval_seed: int = 1234,
        weights: Weights = "raw",
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
        """Score the start, unless a checkpoint has brought its figures."""
        if not self.figures and not getattr(trainer, "fast_dev_run", False):
            model = _as_scorer(pl_module)
            if trainer.global_step and trainer.is_global_zero:
                _logger.warning("the report's `before` is of step %d, not 0", trainer.global_step)
            self._rows = read_first_captions(trainer, self.num_captions)
            self.figures["before"] = self._score(trainer, model, "before training", "raw")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the trained model, and the best checkpoint."""
        if self.figures:
            self._score_end(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report; a run that was finished before repeats it, or makes it up."""
        run_dir = Path(trainer.default_root_dir)
        written = trainer.strategy.broadcast(is_written(run_dir))
        if self.figures and "after" not in self.figures and not written:
            # The trainer has put the module away by now.
            pl_module.to(trainer.strategy.root_device)
            self._score_end(trainer, pl_module)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        if "after" in self.figures:
            write_report(run_dir, self._table(), self._panels(), facts=self._facts(run_dir))
        elif written:
            show_written_report(run_dir)

    @override
    def state_dict(self) -> dict[str, Any]:
        before = {name: asdict(at) for name, at in self.figures.items() if name == "before"}
        return {"rows": self._rows, "figures": before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]
        self.figures = {name: Figures(**at) for name, at in state_dict["figures"].items()}

    # Scoring

    def _score_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the last weights and those of the best checkpoint, which may be the same."""
        model = _as_scorer(pl_module)
        self.figures["after"] = self._score(trainer, model, "after training", self.weights)
        own = best_checkpoint(Path(trainer.default_root_dir)) if trainer.is_global_zero else None
        best: Path | None = trainer.strategy.broadcast(own)
        if best is None:
            return
        self.best_step = checkpoint_step(best)
        if self.best_step == trainer.global_step:
            self.figures["best"] = self.figures["after"]
            return
        with stored_weights(pl_module, best, self.weights):
            title = f"the best checkpoint, {best.name}"
            self.figures["best"] = self._score(trainer, model, title, "raw")

    def _score(
        self, trainer: pl.Trainer, model: ImageScorer, what: str, weights: Weights
    ) -> Figures:
        """Score one set of weights; every rank makes equally many images."""
        places = own_places(trainer, len(self._rows))
        part = _Part(_scene_score(self._rows))
        progress = show_progress(f"scoring {what}", len(places)) if trainer.is_global_zero else None
        with progress or contextlib.nullcontext(_ignore) as advance, torch.no_grad():
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                rows = [self._rows[min(place, len(self._rows) - 1)] for place in batch]
                captions, ids = [r["caption"] for r in rows], [r["sample_id"] for r in rows]
                images = model.generate(captions, ids, self.eval_seed, weights)
                rewards = model.score_images(images, captions)
                num_own = sum(place < len(self._rows) for place in batch)
                part.add(batch[:num_own], rows, images, rewards, self.num_pictures)
                advance(len(batch))
        return _join(gather_objects(part.to_plain()), part.facts)

    # Writing

    def _table(self) -> ReportTable:
        columns = [name for name in ("before", "after", "best") if name in self.figures]
        headings = ["best " + f"(step {self.best_step})" if c == "best" else c for c in columns]
        rows = []
        for name, before in self.figures["before"].values.items():
            values = [self.figures[c].values.get(name, float("nan")) for c in columns]
            change = f"{values[-1] - before:+.4f}"
            rows.append([name, *(f"{value:.4f}" for value in values), change])
        change_of = f"change ({columns[-1]} - before)"
        return ReportTable("Rewards before and after", ["measure", *headings, change_of], rows)

    def _panels(self) -> list[Panel]:
        columns = [name for name in ("before", "after", "best") if name in self.figures]
        pictures = zip(*(self.figures[name].pictures / 255 for name in columns), strict=True)
        captions = [row["caption"] for row in self._rows]
        return [
            Panel(list(row), columns, caption)
            for row, caption in zip(pictures, captions, strict=False)
        ]

    def _facts(self, run_dir: Path) -> str:
        """Say what was measured, and what the best checkpoint is the best by."""
        text = (
            f"Means over images of the first {len(self._rows)} validation captions; noise of seed "
            f"{self.eval_seed}; {'averaged' if self.weights == 'ema' else 'raw'} weights."
        )
        record = read_best(run_dir)
        if "best" not in self.figures or record is None:
            return text
        return f"{text} The best checkpoint has the {record.mode}imum of `{record.monitor}`."


class _Part:
    """What one rank has scored, by the rows' places."""

    def __init__(self, facts: SceneScore | None) -> None:
        self.facts = facts
        self.rewards: dict[int, dict[str, float]] = {}
        self.pictures: dict[int, Tensor] = {}

    def add(
        self,
        places: Sequence[int],
        rows: Sequence[CaptionRow],
        images: Tensor,
        rewards: dict[str, Tensor],
        num_pictures: int,
    ) -> None:
        """Add the first ``len(places)`` rows of a batch; the others are padding."""
        host = {name: values.tolist() for name, values in rewards.items()}
        for index, place in enumerate(places):
            self.rewards[place] = {name: values[index] for name, values in host.items()}
            if place < num_pictures:
                picture = images[index].nan_to_num().clamp(0, 1)
                self.pictures[place] = picture.mul(255).round().byte().cpu()
        if self.facts is not None and places:
            used = rows[: len(places)]
            captions = [row["caption"] for row in used]
            self.facts.update(images[: len(used)], captions, [row["metadata"] for row in used])

    def to_plain(self) -> tuple[dict[int, dict[str, float]], dict[int, Tensor], Tensor | None]:
        """Return what the other ranks need."""
        counts = None if self.facts is None else self.facts.to_tensor()
        return self.rewards, self.pictures, counts


def _join(parts: Sequence[Any], facts: SceneScore | None) -> Figures:
    """Put the parts of all ranks together; means do not depend on how rows were shared out."""
    rewards = {place: row for part in parts for place, row in part[0].items()}
    pictures = {place: picture for part in parts for place, picture in part[1].items()}
    ordered = [rewards[place] for place in sorted(rewards)]
    values = {name: sum(row[name] for row in ordered) / len(ordered) for name in ordered[0]}
    if facts is not None:
        facts.load_tensor(torch.stack([part[2] for part in parts]).sum(0))
        found = facts.accuracies()
        values |= {label: found[name] for name, label in FACTS.items() if name in found}
    return Figures(values, torch.stack([pictures[place] for place in sorted(pictures)]))


def _scene_score(rows: Sequence[CaptionRow]) -> SceneScore | None:
    if not have_facts(rows):
        return None
    return SceneScore(get_world(rows[0]["metadata"]["world"]), clip_tokenizer())


def _as_scorer(module: object) -> ImageScorer:
    if not isinstance(module, ImageScorer):
        raise ConfigError(
            "RewardReport expects a module that generates and scores images; got "
            f"`{type(module).__name__}`. Remove the callback."
        )
    return module


def _ignore(count: int) -> None:
    """Show no progress."""
