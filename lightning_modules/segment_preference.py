"""Training of CLIP-type scorers with segment-level losses."""

from collections.abc import Sequence
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
from segalign.scenes.models import scorer_model
from segalign.scenes.questions import (
    answer_logits,
    draw_question_bank,
    edit_caption,
    question_answers,
)
from segalign.scenes.world import get_world
from segalign.text.tokenizer import CONTEXT_LENGTH, clip_tokenizer
from segalign.types import CaptionBatch

IMAGE_MEAN, IMAGE_STD = 0.5, 0.5


class SegmentPreferenceModule(TrainingModule):
    """Train the scenes scorer: dense segment-level questions, then whole-caption contrast.

    The dense loss asks, for every cell and attribute, which of several one-fact segments fits the
    image; the contrastive loss sets captions that fit the context against those of other images
    and against their own edits.

    Args:
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; null keeps the rate constant.
        world: World of the data.
        seed: Seeds wordings and edits.
        contrastive_weight: Factor of the contrastive loss.
        contrastive_start: Optimizer step from which the contrastive loss is added.
        num_edits: Edited captions for each image.
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
        max_logit_scale: PositiveInt = 100,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.world = get_world(world)
        self.seed = seed
        self.contrastive_weight = contrastive_weight
        self.contrastive_start = contrastive_start
        self.num_edits = num_edits
        self.max_logit_scale = max_logit_scale

    @override
    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        self.model = scorer_model(self.world)
        self.tokenizer = clip_tokenizer()

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images in [0, 1], ``(B, 3, H, W)``, as unit vectors ``(B, E)``."""
        pooled = self.model.vision_model(pixel_values=(images - IMAGE_MEAN) / IMAGE_STD)
        return F.normalize(self.model.visual_projection(pooled.pooler_output), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embed texts of at most 77 tokens as unit vectors ``(N, E)``."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=CONTEXT_LENGTH,
            return_tensors="pt",
        )
        pooled = self.model.text_model(input_ids=tokens.input_ids.to(self.device))
        return F.normalize(self.model.text_projection(pooled.pooler_output), dim=-1)

    @override
    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        image_features = self.image_features(batch["images"])
        losses, answered = self._dense_losses(batch, image_features, self.global_step)
        self.log_train("dense_accuracy", answered, batch)
        if self.contrastive_weight > 0 and self.global_step >= self.contrastive_start:
            contrast = self._contrastive_losses(batch, image_features)
            losses = losses + self.contrastive_weight * contrast
            self.log_train("contrastive_loss", contrast.detach().mean(), batch)
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

    @override
    def on_train_batch_end(self, outputs: object, batch: CaptionBatch, batch_idx: int) -> None:
        """Keep the temperature in its range."""
        bound = float(torch.tensor(float(self.max_logit_scale)).log())
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=bound)

    def _dense_losses(
        self, batch: CaptionBatch, image_features: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        random = Random(counter_seed("question bank", self.seed, step))  # noqa: S311
        bank = draw_question_bank(self.world, random)
        segments = self.text_features(bank.segments)
        similarities = self.model.logit_scale.exp() * image_features @ segments.T
        answers = question_answers(batch["metadata"], self.world).to(self.device)
        losses, right = dense_segment_loss(answer_logits(similarities, bank.table), answers)
        return losses, right.sum() / (answers >= 0).sum().clamp(min=1)

    def _contrastive_losses(self, batch: CaptionBatch, image_features: Tensor) -> Tensor:
        edits = [
            edit_caption(caption, metadata.get("facts", ()), self._edit_random(int(sample), edit))
            for caption, metadata, sample in zip(
                batch["captions"], batch["metadata"], batch["sample_ids"].tolist(), strict=True
            )
            for edit in range(self.num_edits)
        ]
        features = self.text_features([*batch["captions"], *edits])
        captions, negatives = features.split([len(batch["captions"]), len(edits)])
        return contrastive_loss(
            image_features,
            captions,
            negatives.unflatten(0, (-1, self.num_edits)),
            self.model.logit_scale,
        )

    def _edit_random(self, sample_id: int, edit: int) -> Random:
        return Random(counter_seed("edit", self.seed, self.global_step, sample_id, edit))  # noqa: S311
