"""Training of the scorers of scenes, with the ground truth that only scenes have."""

from collections.abc import Sequence
from itertools import chain
from random import Random
from typing import cast

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.segment_preference import Batch, SegmentPreferenceModule
from segalign.errors import ConfigError
from segalign.losses.preference import dense_segment_loss, edit_contrastive_loss
from segalign.rewards.scorer_source import ScorerSource
from segalign.rng import counter_normal, counter_seed, counter_uniform
from segalign.scenes.questions import (
    answer_logits,
    draw_question_bank,
    edit_caption,
    one_segment,
    question_answers,
)
from segalign.scenes.reading import FactReader
from segalign.scenes.scorers import ScenesScorer
from segalign.scenes.world import get_world
from segalign.text.tokenizer import CONTEXT_LENGTH, clip_tokenizer
from segalign.types import CaptionBatch


class ScenesScorerModule(SegmentPreferenceModule):
    """Train a scorer of scenes: dense segment-level questions, then whole-caption contrast.

    The dense loss asks, for every cell and attribute, which of several one-fact segments fits the
    image; the contrastive loss sets captions that fit the context, or one segment of them, against
    those of other images and against their own edits. Both read the scenes' ground truth.

    Args:
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; null keeps the rate constant.
        scorer: Where the model comes from; null starts untrained.
        world: World of the data.
        seed: Seeds wordings, edits and noise.
        contrastive_weight: Factor of the contrastive loss.
        contrastive_start: Optimizer step from which the contrastive loss is added.
        num_edits: Edited texts for each image.
        reading_weight: Factor of the loss that reads facts off the ends of sentences; 0 is off.
        read_before_end: Read texts off the token before the end token too; transformers' CLIP only.
        max_noise: Images are mixed with Gaussian noise of a deviation drawn from [0, this].
        max_logit_scale: Upper bound of the inverse temperature.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        scorer: ScorerSource | None = None,
        world: str = "3x3",
        seed: int = 0,
        contrastive_weight: NonNegativeFloat = 0.5,
        contrastive_start: int = 0,
        num_edits: PositiveInt = 2,
        reading_weight: NonNegativeFloat = 0.0,
        read_before_end: bool = True,
        max_noise: NonNegativeFloat = 0.0,
        max_logit_scale: PositiveFloat = 100,
    ) -> None:
        super().__init__(
            optimizer,
            lr_scheduler,
            scorer=scorer or ScenesScorer(world=world, weights="random"),
            max_logit_scale=max_logit_scale,
        )
        self.world = get_world(world)
        self.seed = seed
        self.contrastive_weight = contrastive_weight
        self.contrastive_start = contrastive_start
        self.num_edits = num_edits
        self.reading_weight = reading_weight
        self.read_before_end = read_before_end
        self.max_noise = max_noise

    @override
    def configure_losses(self) -> None:
        if not hasattr(self.scorer.model, "text_model") and (
            self.read_before_end or self.reading_weight
        ):
            raise ConfigError(
                "expected a scorer of transformers for `read_before_end` and `reading_weight`; "
                f"got `{type(self.scorer_source).__name__}`; set them to false and 0"
            )
        self.tokenizer = clip_tokenizer()
        self.reader = (
            FactReader(self.world, self.scorer.tower.width) if self.reading_weight else None
        )

    def pooled_features(self, texts: Sequence[str]) -> Tensor:
        """Embed texts of at most 77 tokens as unit vectors, pooled in one or two ways.

        Returns:
            ``(1, N, E)`` or ``(2, N, E)``: read off the end token, as CLIP does, and with
            ``read_before_end`` off the token before it too. A generator that drops end tokens sees
            only the latter, so its text tower must know the text there.
        """
        if not self.read_before_end:
            return self.scorer.text_features(texts).unsqueeze(0)
        input_ids, states = self._text_states(texts)
        rows = torch.arange(len(states), device=self.device)
        ends = (input_ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        pooled = torch.stack([states[rows, ends], states[rows, ends - 1]])
        return F.normalize(self.scorer.model.text_projection(pooled), dim=-1)

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
        return input_ids, self.scorer.model.text_model(input_ids=input_ids).last_hidden_state

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = cast("CaptionBatch", batch)
        image_features = self.scorer.image_features(self._noisy(batch))
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
        loss = self.reduce_losses(losses, batch)
        self.log_train("loss", loss.detach(), batch)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        batch = cast("CaptionBatch", batch)
        _, answered = self._dense_losses(batch, self.scorer.image_features(batch["images"]), 0)
        num_valid = int(batch["valid"].sum())
        self.log(
            "val/dense_accuracy", answered, prog_bar=True, sync_dist=True, batch_size=num_valid
        )

    def _noisy(self, batch: CaptionBatch) -> Tensor:
        """Add noise of a random strength to every image; a function of seed, step and sample."""
        images = batch["images"]
        if self.max_noise == 0:
            return images
        ids = batch["sample_ids"].tolist()
        counters = (self.seed, self.global_step)
        strengths = [self.max_noise * counter_uniform("noise level", *counters, i) for i in ids]
        rows = [(*counters, sample_id) for sample_id in ids]
        noise = counter_normal("image noise", rows, images.shape[1:]).to(images)
        return (images + images.new_tensor(strengths).view(-1, 1, 1, 1) * noise).clamp(0, 1)

    def _dense_losses(
        self, batch: CaptionBatch, image_features: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return losses ``(B,)`` and the share of right answers by the end token."""
        random = Random(counter_seed("question bank", self.seed, step))  # noqa: S311
        bank = draw_question_bank(self.world, random)
        answers = question_answers(batch["metadata"], self.world).to(self.device)
        scaled = self.logit_scale.exp() * image_features
        losses, rights = zip(
            *(
                dense_segment_loss(answer_logits(scaled @ segments.T, bank.table), answers)
                for segments in self.pooled_features(bank.segments)
            ),
            strict=True,
        )
        accuracy = rights[0].sum() / (answers >= 0).sum().clamp(min=1)
        return torch.stack(losses).mean(dim=0), accuracy

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
        features = self.pooled_features([*texts, *chain.from_iterable(edits)])
        losses = [
            edit_contrastive_loss(
                image_features,
                pooled[: len(texts)],
                pooled[len(texts) :].unflatten(0, (len(texts), self.num_edits)),
                self.logit_scale,
            )
            for pooled in features
        ]
        return torch.stack(losses).mean(dim=0)

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
