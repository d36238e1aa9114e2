"""The two towers of a CLIP-type model: images and captions, whole or in segments, as unit vectors.

Rewards use it frozen, preference training with gradients.

Dims: B batch, N texts, E joint-embedding width, H/W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segalign.formats.clip_scorer import ResizeFilter, Scorer
from segalign.rewards.image_preprocessing import ImagePreprocessing
from segalign.text.clip_tower import ClipTower
from segalign.text.long_segments import cut_segment
from segalign.text.segmenter import Segment, Segmenter
from segalign.text.tokenizer import TextCleaning


@dataclass(frozen=True, eq=False)
class SegmentFeatures:
    """Features of all segments of a batch of captions, one below the other.

    Attributes:
        features: Unit vectors ``(N, E)``.
        owner: Caption that each segment belongs to, int64 ``(N,)``, ascending, in [0, B).
        texts: The segments.
    """

    features: Tensor
    owner: Tensor
    texts: list[str]

    def split(self) -> list[Tensor]:
        """Return each caption's features, ``(n, E)``; every caption has at least one segment."""
        return list(torch.split(self.features, torch.bincount(self.owner).tolist()))

    def mean(self) -> Tensor:
        """Average each caption's features, ``(B, E)``; shorter than 1 where segments differ."""
        counts = torch.bincount(self.owner)
        sums = self.features.new_zeros(len(counts), self.features.shape[1])
        return sums.index_add(0, self.owner, self.features) / counts.unsqueeze(-1)


class SegmentScorer(nn.Module):
    """Embed images and texts with a CLIP-type model, of transformers or ``open_clip``.

    A text's features depend on it alone, whatever it is batched with; equal texts are encoded once,
    in a few passes of similar lengths.

    Args:
        scorer: Model, tokenizer and image settings; the model stays as trainable as it is.
        segmenter: Splits captions; None takes them whole.
        cleaning: Repair of texts, see ``clean_text``; None is the model's own.
        resize: Filter; None is the model's own.
        crop: See ``ImagePreprocessing``.
        seed: Seed of the crop.
        cache_bytes: Bound on the memory of cached text features of a frozen model.
    """

    tower: ClipTower

    def __init__(
        self,
        scorer: Scorer,
        *,
        segmenter: Segmenter | None = None,
        cleaning: TextCleaning | None = None,
        resize: ResizeFilter | None = None,
        crop: int | None = None,
        seed: int = 0,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        super().__init__()
        self.model: Any = scorer.model
        # Not registered: the text model has its name, place and mode within the model.
        tower = ClipTower(
            scorer.text_tower(),
            scorer.tokenizer,
            cache_bytes=cache_bytes,
            cleaning=cleaning or scorer.cleaning,
        )
        object.__setattr__(self, "tower", tower)
        self.segmenter = segmenter
        self.preprocessing = ImagePreprocessing(
            scorer.image_settings, resize=resize, crop=crop, seed=seed
        )
        self._parts = scorer

    @property
    def width(self) -> int:
        """Joint-embedding width E."""
        return self._parts.width

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature, ``(1,)``, with which the model was trained."""
        return self._parts.logit_scale

    def image_features(self, images: Tensor) -> Tensor:
        """Embed images in [0, 1], ``(B, 3, H, W)``, as unit vectors ``(B, E)``.

        Differentiable in the images, and in the model's weights where those are trained.
        """
        features = self._parts.encode_image(self.preprocessing(images))
        return F.normalize(features.to(images.dtype), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, cut at the context, as unit vectors ``(N, E)``, in float32 at least."""
        features = self._parts.project_text(self.tower.end_states(texts))
        if features.dtype in (torch.float16, torch.bfloat16):
            features = features.float()
        return F.normalize(features, dim=-1)

    def segment_features(
        self,
        captions: Sequence[str],
        encode: Callable[[Sequence[str]], Tensor] | None = None,
        segmenter: Segmenter | None = None,
    ) -> SegmentFeatures:
        """Embed the segments of captions, over-long ones cut further.

        Without a segmenter a caption is one segment, of which the context's worth is read.

        Args:
            captions: ``B`` captions.
            encode: Embeds the segments instead of ``text_features``, for instance in chunks.
            segmenter: Splits the captions instead of the scorer's own.
        """
        split = [self.split(caption, segmenter) for caption in captions]
        texts = [text for one in split for text in one]
        features = (encode or self.text_features)(texts)
        counts = torch.tensor([len(one) for one in split], device=features.device)
        rows = torch.arange(len(split), device=features.device)
        return SegmentFeatures(features, rows.repeat_interleave(counts), texts)

    def split(self, caption: str, segmenter: Segmenter | None = None) -> list[str]:
        """Split a caption into the texts that are embedded, at least one: see `pieces`."""
        return [piece.text for piece in self.pieces(caption, segmenter)]

    def pieces(self, caption: str, segmenter: Segmenter | None = None) -> list[Segment]:
        """Split a caption into the segments that are embedded, at least one.

        Args:
            caption: The caption.
            segmenter: Splits it instead of the scorer's own; without either it is one segment.
        """
        whole = [Segment(caption, 0, len(caption))]
        chosen = segmenter or self.segmenter
        if chosen is None:
            return whole
        tower = self.tower
        pieces = [
            piece
            for segment in chosen.split(caption)
            for piece in cut_segment(segment, tower.max_word_tokens, tower.count_word_tokens)
        ]
        return pieces or whole
