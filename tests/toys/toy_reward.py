"""Modules that generate and score images, without a reward model."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.long_text_diffusion import LongTextDiffusionModule
from segalign.scenes.samples import make_sample
from segalign.types import CaptionBatch


def brightness(images: Tensor) -> dict[str, Tensor]:
    mean = images.flatten(1).mean(1)
    return {"reward": mean, "reward/text_relevant": 2 * mean, "held_out/darkness": -mean}


class BrightModule(LongTextDiffusionModule):
    """A real generator whose reward is how bright its images are."""

    def score_images(
        self, images: Tensor, captions: Sequence[str], valid: Tensor | None = None
    ) -> dict[str, Tensor]:
        return brightness(images)


class Captions(pl.LightningDataModule):
    """Captions of scenes in batches of four rows over all ranks; the last batch is padded."""

    def __init__(self, count: int, *, with_facts: bool = True):
        super().__init__()
        self.samples = [make_sample("2x2", 5, index) for index in range(count)]
        self.with_facts = with_facts

    def train_dataloader(self):
        return DataLoader([torch.zeros(1)] * 100, batch_size=None)

    def val_dataloader(self):
        rank, share = self.trainer.global_rank, 4 // self.trainer.world_size
        starts = range(rank * share, -(-len(self.samples) // 4) * 4, 4)
        batches = [self.batch(range(start, start + share)) for start in starts]
        return DataLoader(batches, batch_size=None) if batches else []

    def batch(self, places: Sequence[int]) -> CaptionBatch:
        valid = [place < len(self.samples) for place in places]
        rows = [self.samples[place] for place in places if place < len(self.samples)]
        padding = len(places) - len(rows)
        metadata = [row.metadata if self.with_facts else {} for row in rows]
        return {
            "sample_ids": torch.tensor(places),
            "captions": [row.caption for row in rows] + [""] * padding,
            "valid": torch.tensor(valid),
            "epochs": torch.zeros(len(places), dtype=torch.int64),
            "metadata": metadata + [{}] * padding,
        }


class Painter(pl.LightningModule):
    """Its shade grows by 25 bytes in each step; from 0.35 on it draws scenes, before that, grey."""

    def __init__(self, samples, values=None):
        super().__init__()
        self.values = values or {}
        self.shade = nn.Parameter(torch.zeros(1))
        self.pictures = {row.caption: torch.tensor(row.image) for row in samples}
        self.calls: list[tuple[list[int], str]] = []
        self.ema = None
        self.strict_loading = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=25 / 255)

    def training_step(self, batch, batch_idx):
        return -self.shade.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/held_out", self.values.get(self.global_step, 0.0), batch_size=1)

    def generate(self, captions, sample_ids, eval_seed, weights="raw"):
        self.calls.append((list(sample_ids), weights))
        if weights == "ema":
            with self.ema.swapped(self):
                return self.paint(captions, sample_ids)
        return self.paint(captions, sample_ids)

    def paint(self, captions, sample_ids):
        shade = self.shade.detach()
        if shade > 0.35:
            drawn = torch.stack([self.pictures[caption] for caption in captions])
            return drawn.permute(0, 3, 1, 2) / 255
        offsets = torch.tensor(list(sample_ids)).view(-1, 1, 1, 1) / 255
        return (shade + offsets).expand(-1, 3, 24, 24)

    @property
    def best_weights(self):
        return "raw" if self.ema is None else "ema"

    def score_images(self, images, captions, valid=None):
        return brightness(images)
