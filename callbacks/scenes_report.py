"""Before and after: what fine-tuning on long captions has changed, as a table and a picture."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from callbacks.before_after import is_written, show_written_report, write_report
from segalign.data.progress import show_progress
from segalign.diffusion.generator import ImageGenerator, Weights
from segalign.errors import ConfigError
from segalign.metrics.report_table import ReportTable
from segalign.pictures import Panel
from segalign.scenes.evaluation import score_generator
from segalign.scenes.grammar import CaptionLength
from segalign.scenes.samples import SceneSample, make_sample
from segalign.text.settings import TextEncoding
from segalign.text.tokenizer import clip_tokenizer

# The stream of the report's scenes; training streams are seeded by small numbers.
REPORT_STREAM = 2**40
HEADINGS = ("captions", "encoding", "all", "within 77 tokens", "past token 77")
COLUMNS = ("attributes", "attributes/within_77", "attributes/past_77")


@runtime_checkable
class SwitchableGenerator(ImageGenerator, Protocol):
    """An image generator that can read captions in another way for a while."""

    text: TextEncoding

    def text_encoding(self, text: TextEncoding) -> contextlib.AbstractContextManager[None]:
        """Encode captions differently for the duration of a block."""
        ...


def _switchable(module: object) -> SwitchableGenerator:
    if not isinstance(module, SwitchableGenerator):
        raise ConfigError(
            f"ScenesReport expects a LongTextDiffusionModule; got `{type(module).__name__}`. "
            "Remove the callback."
        )
    return module


class ScenesReport(Callback):
    """Score the model on new scenes before and after training, and print both.

    The truncated encoding is scored with the same weights, for comparison: it is evaluated only,
    never trained here. The table is ``report.md`` in the run directory, the picture ``report.png``.

    Args:
        world: World of the scenes.
        num_captions: Captions of each length that are scored.
        num_pictures: Prompts in the picture.
        batch_size: Pictures made at once.
        eval_seed: Seed of the pictures' noise.
        weights: Weights that are scored after training.
    """

    def __init__(
        self,
        world: str = "3x3",
        num_captions: PositiveInt = 96,
        num_pictures: PositiveInt = 6,
        batch_size: PositiveInt = 32,
        eval_seed: int = 1234,
        weights: Weights = "raw",
    ) -> None:
        super().__init__()
        self.world = world
        self.num_captions = num_captions
        self.num_pictures = num_pictures
        self.batch_size = batch_size
        self.eval_seed = eval_seed
        self.weights = weights
        self._after: Tensor | None = None
        self.rows: dict[str, dict[str, float]] = {}
        self._before: Tensor | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the base, unless a checkpoint has brought its score."""
        if not self.rows:
            self._before = self._score_all(_switchable(pl_module), "before", "raw")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the trained model."""
        self._after = self._score_all(_switchable(pl_module), "after", self.weights)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report; a run that was finished before repeats it, or makes it up."""
        run_dir = Path(trainer.default_root_dir)
        written = is_written(run_dir)
        if self._after is None and not written and self.rows:
            self._after = self._score_all(_switchable(pl_module), "after", self.weights)
        if not trainer.is_global_zero:
            return
        if self._after is not None:
            self._write(run_dir, self._after)
        elif written:
            show_written_report(run_dir)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "before": self._before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._before = state_dict["rows"], state_dict["before"]

    def _score_all(self, model: SwitchableGenerator, when: str, weights: Weights) -> Tensor:
        """Fill the rows of one moment; return the first pictures of the long captions."""
        truncated = TextEncoding(kind="truncated", mask_padding=model.text.mask_padding)
        with model.text_encoding(truncated):
            for length in ("long", "short"):
                self._score(model, when, "truncated (evaluated only)", length, weights)
        own = f"{model.text.kind} (trained)"
        self._score(model, when, own, "short", weights)
        return self._score(model, when, own, "long", weights)

    def _score(
        self,
        model: SwitchableGenerator,
        when: str,
        encoding: str,
        length: CaptionLength,
        weights: Weights,
    ) -> Tensor:
        pictures: list[Tensor] = []

        def generate(captions: Sequence[str], sample_ids: Sequence[int]) -> Tensor:
            images = model.generate(captions, sample_ids, self.eval_seed, weights)
            pictures.extend(images.cpu()[: self.num_pictures - len(pictures)])
            return images

        title = f"scoring {when} training: {length} captions, {encoding}"
        with show_progress(title, self.num_captions) as advance:
            score = score_generator(
                generate, self._samples(length), clip_tokenizer(), self.batch_size, advance
            )
        row = self.rows.setdefault(f"{length} | {encoding}", {})
        chance = score.chance_accuracies()
        row |= {f"{when} {name}": value for name, value in score.accuracies().items()}
        row |= {f"{when} chance {name}": value for name, value in chance.items()}
        return torch.stack(pictures)

    def _samples(self, length: CaptionLength) -> list[SceneSample]:
        return [
            make_sample(self.world, REPORT_STREAM, index, length=length)
            for index in range(self.num_captions)
        ]

    def _write(self, run_dir: Path, after: Tensor) -> None:
        assert self._before is not None
        panels = [
            Panel([before, now], ["before", "after"], sample.caption)
            for before, now, sample in zip(self._before, after, self._samples("long"), strict=False)
        ]
        title = "Attribute accuracy: before -> after (chance)"
        write_report(run_dir, ReportTable(title, list(HEADINGS), self._cells()), panels)

    def _cells(self) -> list[list[str]]:
        return [
            [*name.split(" | "), *(self._cell(row, column) for column in COLUMNS)]
            for name, row in sorted(self.rows.items())
        ]

    def _cell(self, row: dict[str, float], column: str) -> str:
        if f"after {column}" not in row:
            return "-"
        chance = row.get(f"after chance {column}", float("nan"))
        return f"{row[f'before {column}']:.3f} -> {row[f'after {column}']:.3f} ({chance:.2f})"
