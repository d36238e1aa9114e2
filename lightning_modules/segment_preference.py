"""Training of CLIP-type preference models that score long captions piece by piece."""

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_modules.training import TrainingModule
from segalign.errors import ConfigError, DataError
from segalign.losses.caption_weights import pair_weights
from segalign.losses.contrastive import OwnedFeatures
from segalign.losses.objective import PreferenceFeatures, PreferenceObjective
from segalign.rewards.chunks import encode_in_chunks, encode_texts
from segalign.rewards.scorer_source import PretrainedScorer, ScorerSource
from segalign.rewards.segment_scorer import SegmentFeatures, SegmentScorer
from segalign.rewards.trained_parts import TrainedParts
from segalign.sharded_tensors import local
from segalign.sharding import is_sharded, shard_trained_layers
from segalign.text.segmenter import Segmenter, SentenceSegmenter
from segalign.types import CaptionBatch, PreferenceBatch

Batch = CaptionBatch | PreferenceBatch


class SegmentPreferenceModule(TrainingModule):
    """Train a CLIP-type scorer on preference pairs, or on images with captions, of any length.

    A caption's score is the mean of its segments' scores. Which losses are summed, on captions or
    on single segments, is the objective's choice; docs/preference.md has their equations.

    Args:
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; null keeps the rate constant.
        scorer: Where the model comes from; null starts from CLIP-H.
        objective: Weights of the losses; null is the segment-level recipe: pairwise and contrast.
        text: ``segments`` scores captions piece by piece; ``whole`` cuts them at the context.
        segmenter: Splitting strategy; null splits into sentences.
        trained: What of the model is trained; null trains all of it.
        max_logit_scale: Upper bound of the inverse temperature.
        init_logit_scale: Inverse temperature to start from; null keeps the model's.
        weigh_captions: Weigh pairs by one over the number of pairs of their caption, as PickScore
            does: the ``num_pairs`` of their metadata (in Pick-a-Pic ``num_example_per_prompt``), or
            else those of the batch.
        chunk_size: Images, and texts, that are encoded at a time, their activations recomputed in
            the backward pass: less memory for big contrastive batches. Null encodes all at once;
            so are the texts of a sharded tower.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        scorer: ScorerSource | None = None,
        objective: PreferenceObjective | None = None,
        text: Literal["segments", "whole"] = "segments",
        segmenter: Segmenter | None = None,
        trained: TrainedParts | None = None,
        max_logit_scale: PositiveFloat = 100.0,
        init_logit_scale: PositiveFloat | None = None,
        weigh_captions: bool = False,
        chunk_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.scorer_source = scorer or PretrainedScorer()
        self.objective = objective or PreferenceObjective(pairwise=1.0, segment_contrastive=1.0)
        self.text = text
        self.segmenter = segmenter or SentenceSegmenter()
        self.trained = trained or TrainedParts()
        self.max_logit_scale = max_logit_scale
        self.init_logit_scale = init_logit_scale
        self.weigh_captions = weigh_captions
        self.chunk_size = chunk_size

    @override
    def configure_model(self) -> None:
        if hasattr(self, "scorer"):
            return
        source = self.scorer_source.load()
        start = source.logit_scale.detach().clone()
        if self.init_logit_scale is not None:
            start.fill_(math.log(self.init_logit_scale))
        # One-dimensional, as sharding wants it.
        source.model.logit_scale = nn.Parameter(start)
        self.trained.apply(source.model)
        if not self.objective.needs_logit_scale():
            # Ranks wait for the gradient of whatever is trained.
            source.model.logit_scale.requires_grad_(False)
        if not any(weight.requires_grad for weight in source.model.parameters()):
            raise ConfigError(
                "expected `trained` to leave something that the objective teaches; got frozen "
                "towers; raise `image_blocks` or `text_blocks`"
            )
        segmenter = self.segmenter if self.text == "segments" else None
        self.scorer = SegmentScorer(source, segmenter=segmenter)
        self.configure_losses()
        self.check_trained_precision()
        self.share_weights()
        self.train()

    def configure_losses(self) -> None:
        """Make what else the losses train, once the scorer is there; here: nothing."""

    @override
    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the layers of the trained towers.

        Ranks have texts of other lengths, and each pass is a collective of all: there is to be one.
        """
        shard_trained_layers(self.scorer.model, mesh)
        if self._has_sharded_texts:
            tower = self.scorer.tower
            tower.width_step, tower.max_pass_tokens = tower.context_length, sys.maxsize

    @property
    def _has_sharded_texts(self) -> bool:
        return is_sharded(self.scorer.tower.text_model)

    @override
    def on_fit_start(self) -> None:
        """See that the weights are sound before anything is learnt from them.

        Raises:
            ConfigError: If trained weights are of low precision.
            DataError: If a weight is not finite.
        """
        super().on_fit_start()
        weights = dict(self.scorer.model.named_parameters())
        found = torch.stack([(~local(weight).isfinite()).any() for weight in weights.values()])
        if is_sharded(self):
            found = self.trainer.strategy.reduce(found.float(), reduce_op="sum")
        for name, is_bad in zip(weights, found.tolist(), strict=True):
            if is_bad:
                raise DataError(
                    f"expected finite weights of the scorer before training; `{name}` holds NaN or "
                    "infinity; check what `scorer` names"
                )

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature, ``(1,)``, bounded where it is used.

        The gradient passes the bound: CLIP's own temperature starts there, and must come down.
        """
        free = self.scorer.logit_scale
        bounded = free.detach().clamp(max=math.log(self.max_logit_scale))
        return free + (bounded - free.detach())

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Take the temperature back to its bound, lest it goes astray beyond."""
        with torch.no_grad():
            self.scorer.model.logit_scale.clamp_(max=math.log(self.max_logit_scale))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features = self.encode(batch)
        with torch.autocast(self.device.type, enabled=False):
            scale = self.logit_scale.to(features.images)
            losses = self.objective.losses(features, scale)
            loss = self.reduce_losses(self.objective.total(losses), batch)
            if features.preference_probs is not None:
                self.log_train("pair_accuracy", _pair_accuracy(features), batch)
        num_valid = batch["valid"].sum().clamp(min=1)
        for name, values in losses.items():
            self.log_train(f"{name}_loss", values.detach().sum() / num_valid, batch)
        self.log("train/inverse_temperature", self.logit_scale.detach().exp())
        self.log_train("loss", loss.detach(), batch)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: callbacks of the evaluation see the batch and the scorer."""

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: callbacks of the evaluation see the batch and the scorer."""

    @override
    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score images in [0, 1] against their own captions, unscaled, ``(B,)``."""
        texts = self.scorer.segment_features(captions).mean()
        return (self.scorer.image_features(images) * texts).sum(dim=-1)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        """Refuse: a preference model has no images to predict.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "expected a model that makes images for `predict`; got a preference model; use `test` "
            "for its tables, or `export --format clip` to score with it"
        )

    def encode(self, batch: Batch) -> PreferenceFeatures:
        """Embed a batch's captions and images, with gradients."""
        segments = self._segments(batch["captions"])
        probs = batch.get("preference_probs")
        images = encode_in_chunks(self.scorer.image_features, _images(batch), self.chunk_size)
        return PreferenceFeatures(
            segments=OwnedFeatures(segments.features, segments.owner),
            segment_texts=segments.texts,
            mean=segments.mean(),
            captions=batch["captions"],
            images=images.to(segments.features),  # float32 at least, as those are
            preference_probs=cast("Tensor | None", probs),
            valid=batch["valid"],
            pair_weights=self._pair_weights(batch),
        )

    def _pair_weights(self, batch: Batch) -> Tensor | None:
        if not self.weigh_captions:
            return None
        counts = [_num_pairs(fields) for fields in batch["metadata"]]
        return pair_weights(batch["captions"], counts, batch["valid"])

    def _segments(self, captions: list[str]) -> SegmentFeatures:
        """Embed the captions' segments, a chunk of them at a time."""
        chunk_size = None if self._has_sharded_texts else self.chunk_size
        encode = partial(encode_texts, self.scorer.text_features, chunk_size=chunk_size)
        return self.scorer.segment_features(captions, encode)


def _num_pairs(metadata: Mapping[str, Any]) -> Any:
    """Look up how many pairs a caption has in the data; Pick-a-Pic's own name is known too."""
    return metadata.get("num_pairs", metadata.get("num_example_per_prompt"))


def _images(batch: Batch) -> Tensor:
    """Return a batch's images, the two of a pair one after the other: ``(M, 3, H, W)``."""
    fields = cast("dict[str, Tensor]", batch)
    return fields["image_pairs"].flatten(0, 1) if "image_pairs" in fields else fields["images"]


def _pair_accuracy(features: PreferenceFeatures) -> Tensor:
    """Share of the pairs with a preference whose preferred image scores higher."""
    assert features.preference_probs is not None
    wanted = features.preference_probs[:, 0] - features.preference_probs[:, 1]
    scores = features.pair_scores().detach()
    asked = features.valid & (wanted != 0)
    right = asked & ((scores[:, 0] - scores[:, 1]) * wanted > 0)
    return right.sum() / asked.sum().clamp(min=1)
