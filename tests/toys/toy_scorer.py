"""A tiny CLIP scorer, a module that holds it, and batches to evaluate it on."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel

from segalign.formats.clip_scorer import ClipScorer, ImageSettings
from segalign.rewards.segment_scorer import SegmentScorer
from segalign.text.segmenter import SentenceSegmenter
from segalign.text.tokenizer import clip_tokenizer

ANIMALS = ["fox", "owl", "hen", "cat", "dog", "bee", "ant", "elk", "cow", "pig", "rat", "bat"]
WIDTH = 12


def toy_scorer(segmenter=None) -> SegmentScorer:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text = shape | {
        "vocab_size": 49408, "num_attention_heads": 2, "bos_token_id": 49406,
        "eos_token_id": 49407,
    }  # fmt: skip
    vision = shape | {"image_size": 16, "num_attention_heads": 2, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    clip = ClipScorer(CLIPModel(config), clip_tokenizer(), ImageSettings(image_size=16))
    return SegmentScorer(clip, segmenter=segmenter)


def toy_caption(number: int) -> str:
    """Two to five sentences; no two captions are equal."""
    animal, other = ANIMALS[number % 12], ANIMALS[(5 * number + number // 12) % 12]
    more = ["It rains.", f"A {other} watches.", "The moon shines."][: number % 4]
    return " ".join([f"The {animal} runs in field {number}.", f"Its friend is a {other}.", *more])


def toy_batches(num_samples: int, batch_size: int, kind: str = "image") -> list[dict]:
    """Batches as the datamodule makes them; the last one is padded with samples seen before."""
    batches = []
    for start in range(0, num_samples, batch_size):
        ids = [(start + row) % num_samples for row in range(batch_size)]
        valid = torch.tensor([start + row < num_samples for row in range(batch_size)])
        images = torch.stack(
            [
                torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(number))
                for number in ids
            ]
        )
        batch = {
            "sample_ids": torch.tensor(ids),
            "captions": [toy_caption(number) for number in ids],
            "valid": valid,
            "epochs": torch.zeros(batch_size, dtype=torch.int64),
            "metadata": [{"edited": {"start": 0, "end": 5}} for _ in ids],
        }
        if kind == "image":
            batch["images"] = images[:, 0]
        elif kind == "preference":
            batch["image_pairs"] = images
            probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.7, 0.3]])
            batch["preference_probs"] = probs[torch.tensor(ids) % 4]
        batches.append(batch)
    return batches


class ToyScorerModule(pl.LightningModule):
    def __init__(self, segmenter=None):
        super().__init__()
        self.scorer = toy_scorer(segmenter or SentenceSegmenter())
        self.draws = []

    def training_step(self, batch, batch_idx):
        assert self.scorer.training
        self.draws.append(torch.rand(()))
        return self.scorer.image_features(batch["images"]).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class ToyBatches(pl.LightningDataModule):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None, shuffle=False)

    val_dataloader = test_dataloader = train_dataloader
