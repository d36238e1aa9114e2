"""Training of CLIP-type scorers with segment-level losses."""

import math
from collections.abc import Sequence
from itertools import chain
from random import Random

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.training import TrainingModule
from segalign.losses.preference import contrastive_loss, dense_segment_loss
from segalign.rng import counter_seed
from segalign.scenes.base import load_scorer
from segalign.scenes.models import TEXT_WIDTH
from segalign.scenes.questions import (
    answer_logits,
    draw_question_bank,
    edit_caption,
    one_segment,
    question_answers,
)
from segalign.scenes.reading import FactReader
from segalign.scenes.world import get_world
from segalign.text.tokenizer import CONTEXT_LENGTH, clip_tokenizer
from segalign.types import CaptionBatch

IMAGE_MEAN, IMAGE_STD = 0.5, 0.5


class SegmentPreferenceModule(TrainingModule):
    """Train the scenes scorer: dense segment-level questions, then whole-caption contrast.

    The dense loss asks, for every cell and attribute, which of several one-fact segments fits the
    image; the contrastive loss sets captions that fit the context, or one segment of them, against
    those of other images and against their own edits.

    Args:
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; null keeps the rate constant.
        world: World of the data.
        seed: Seeds wordings and edits.
        contrastive_weight: Factor of the contrastive loss.
        contrastive_start: Optimizer step from which the contrastive loss is added.
        num_edits: Edited texts for each image.
        reading_weight: Factor of the loss that reads facts off the ends of sentences; 0 is off.
        start_from: Run whose weights are the start; null starts untrained.
        max_logit_scale: Upper bound of the inverse temperature.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        world: str = "3x3",
        seed: int = 0,
        contrastive_weight: NonNegativeFloat = 0.5,
        contrastive_start: int = 0,
        num_edits: PositiveInt = 2,
        reading_weight: NonNegativeFloat = 0.0,
        start_from: str | None = None,
        max_logit_scale: PositiveInt = 100,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.world = get_world(world)
        self.seed = seed
        self.contrastive_weight = contrastive_weight
        self.contrastive_start = contrastive_start
        self.num_edits = num_edits
        self.reading_weight = reading_weight
        self.start_from = start_from
        self.max_logit_scale = max_logit_scale

    @override
    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = load_scorer(self.world.name, self.start_from or "random")
        self.tokenizer = clip_tokenizer()
        self.reader = FactReader(self.world, TEXT_WIDTH) if self.reading_weight else None

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images in [0, 1], ``(B, 3, H, W)``, as unit vectors ``(B, E)``."""
        pooled = self.model.vision_model(pixel_values=(images - IMAGE_MEAN) / IMAGE_STD)
        return F.normalize(self.model.visual_projection(pooled.pooler_output), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embed texts of at most 77 tokens as unit vectors, pooled in two ways.

        Returns:
            ``(2, N, E)``: read off the end token, as CLIP does, and off the token before it. A
            generator that drops end tokens sees only the latter, so it must know the text too.
        """
        input_ids, states = self._text_states(texts)
        rows = torch.arange(len(states), device=self.device)
        ends = (input_ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        pooled = torch.stack([states[rows, ends], states[rows, ends - 1]])
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def _text_states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts: token ids ``(N, S)`` and last hidden states ``(N, S, D)``."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=CONTEXT_LENGTH,
            return_tensors="pt",
        )
        input_ids = tokens.input_ids.to(self.device)
        return input_ids, self.model.text_model(input_ids=input_ids).last_hidden_state

    @override
    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        image_features = self.image_features(batch["images"])
        losses, answered = self._dense_losses(batch, image_features, self.global_step)
        self.log_train("dense_accuracy", answered, batch)
        if self.contrastive_weight > 0 and self.global_step >= self.contrastive_start:
            contrast = self._contrastive_losses(batch, image_features)
            losses = losses + self.contrastive_weight * contrast
            self.log_train("contrastive_loss", contrast.detach().mean(), batch)
        if self.reader is not None:
            reading = self._reading_losses(batch)
            losses = losses + self.reading_weight * reading
            self.log_train("reading_loss", reading.detach().mean(), batch)
        loss = self.reduce_losses(losses, batch["valid"])
        self.log_train("loss", loss.detach(), batch)
        return loss

    @override
    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        _, answered = self._dense_losses(batch, self.image_features(batch["images"]), 0)
        num_valid = int(batch["valid"].sum())
        self.log(
            "val/dense_accuracy", answered, prog_bar=True, sync_dist=True, batch_size=num_valid
        )

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature, ``(1,)``, bounded where it is used."""
        return self.model.logit_scale.clamp(max=math.log(self.max_logit_scale)).reshape(1)

    def _dense_losses(
        self, batch: CaptionBatch, image_features: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return losses ``(B,)`` and the share of right answers by the end token."""
        random = Random(counter_seed("question bank", self.seed, step))  # noqa: S311
        bank = draw_question_bank(self.world, random)
        answers = question_answers(batch["metadata"], self.world).to(self.device)
        scaled = self.logit_scale.exp() * image_features
        (losses, right), (last_losses, _) = (
            dense_segment_loss(answer_logits(scaled @ segments.T, bank.table), answers)
            for segments in self.text_features(bank.segments)
        )
        accuracy = right.sum() / (answers >= 0).sum().clamp(min=1)
        return (losses + last_losses) / 2, accuracy

    def _reading_losses(self, batch: CaptionBatch) -> Tensor:
        """Return what the ends of sentences do not tell of them, ``(B,)``."""
        assert self.reader is not None
        where, labels = self.reader.statements(batch["captions"], batch["metadata"], self.tokenizer)
        losses: Tensor = self.reader(self._text_states(batch["captions"])[1], where, labels)
        return losses

    def _contrastive_losses(self, batch: CaptionBatch, image_features: Tensor) -> Tensor:
        """Set each image's caption, or one segment of it, against others and its own edits."""
        texts, edits = zip(
            *(self._statement(batch, row) for row in range(len(image_features))), strict=True
        )
        features = self.text_features([*texts, *chain.from_iterable(edits)])
        losses = [
            contrastive_loss(
                image_features,
                pooled[: len(texts)],
                pooled[len(texts) :].unflatten(0, (len(texts), self.num_edits)),
                self.logit_scale,
            )
            for pooled in features
        ]
        return (losses[0] + losses[1]) / 2

    def _statement(self, batch: CaptionBatch, row: int) -> tuple[str, list[str]]:
        """Draw a text of one sample, and edits of it."""
        caption = batch["captions"][row]
        facts = batch["metadata"][row].get("facts", [])
        counters = (self.seed, self.global_step, int(batch["sample_ids"][row]))
        random = Random(counter_seed("statement", *counters))  # noqa: S311
        text, own = (
            (caption, facts) if random.random() < 0.3 else one_segment(caption, facts, random)
        )
        return text, [edit_caption(text, own, random) for _ in range(self.num_edits)]
