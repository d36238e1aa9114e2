"""Validate a generator on scenes by the oracle."""

from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from segalign.diffusion.generator import Weights, as_generator
from segalign.diffusion.made_images import shared_images
from segalign.scenes.evaluation import SceneScore
from segalign.scenes.world import get_world
from segalign.text.tokenizer import clip_tokenizer
from segalign.types import CaptionBatch


class SceneAccuracy(Callback):
    """Generate an image for validation captions and log how many of the stated facts it shows.

    Logs ``val/attributes`` (shapes, colours and sizes), the same within 32, within 77 and past 77
    tokens, ``val/objects``, and each fact kind. Every rank makes equally many images.

    Args:
        world: World of the validation data.
        num_batches: Validation batches that are used, the same ones each time.
        eval_seed: Seed of the images' noise.
        weights: ``raw`` or ``ema``.
    """

    def __init__(
        self,
        world: str = "3x3",
        num_batches: PositiveInt = 4,
        eval_seed: int = 1234,
        weights: Weights = "raw",
    ) -> None:
        super().__init__()
        self.world = get_world(world)
        self.num_batches = num_batches
        self.eval_seed = eval_seed
        self.weights = weights
        self._score: SceneScore | None = None

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting anew."""
        self._score = None if trainer.sanity_checking else SceneScore(self.world, clip_tokenizer())

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: CaptionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Generate and score one batch; padded rows are generated, but not scored."""
        if self._score is None or batch_idx >= self.num_batches:
            return
        ids = batch["sample_ids"].tolist()
        images = shared_images(outputs, self.eval_seed, self.weights)
        if images is None:
            images = as_generator(pl_module).generate(
                batch["captions"], ids, self.eval_seed, self.weights
            )
        rows = batch["valid"].nonzero().flatten().tolist()
        self._score.update(
            images[rows],
            [batch["captions"][row] for row in rows],
            [batch["metadata"][row] for row in rows],
        )

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum over ranks and log."""
        if self._score is None:
            return
        counts = self._score.to_tensor().to(pl_module.device)
        total = trainer.strategy.reduce(counts, reduce_op="sum")
        assert isinstance(total, torch.Tensor)
        self._score.load_tensor(total)
        for name, accuracy in self._score.accuracies().items():
            pl_module.log(
                f"val/{name}", accuracy, prog_bar=name == "attributes", rank_zero_only=False
            )
