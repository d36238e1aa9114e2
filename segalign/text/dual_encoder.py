"""Two CLIP text towers that read the same captions, as Stable Diffusion XL has them.

Dims: B captions, L token budget, D width of both towers together, E width of pooled features.

Reference: arXiv 2307.01952, section 2.1 (two text encoders); features of both are concatenated.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.caption_plan import LongSegments, OverBudget, SegmentTokens
from segalign.text.clip_tower import ClipTower
from segalign.text.conditioning import TextConditioning
from segalign.text.feature_store import FeatureStore
from segalign.text.merging import Pooling, pool_segments
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.segmenter import Segmenter
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.text_states import TextModel
from segalign.text.tokenizer import TokenIds
from segalign.text.truncated_encoder import TruncatedEncoder, read_padded

_SDXL_LAYER = -2


class DualEncoder(SegmentEncoder):
    """Encode each segment with two towers, and concatenate their features along D.

    A caption is split, cut and fitted once, by the first tower; both towers read the same segments.
    Each has its own padding vector. ``pooled`` comes from the second tower alone. The defaults are
    those of Stable Diffusion XL, whose second tokenizer pads with ``!``.

    Args:
        text_model: First tower (SDXL: CLIP-L, 768 wide).
        tokenizer: Its tokenizer.
        text_model_2: Second tower (SDXL: the projecting OpenCLIP bigG, 1280 wide).
        tokenizer_2: Its tokenizer; it may differ from the first in nothing but the padding.
        segmenter: See :class:`SegmentEncoder`, also for what follows.
        policy: Treatment of special tokens.
        token_budget: L.
        long_segments: Treatment of segments that do not fit the context.
        over_budget: Treatment of captions of more than L tokens.
        layer: Layer of both towers that the features of tokens are read from.
        pooled: The ``mean`` over the segments of the second tower's pooled features, or those of
            the ``first`` segment.
        force_zeros_for_empty_prompt: The negative prompt's features are zeros, as in diffusers'
            pipeline of the SDXL base model; else they are those of the encoded empty caption. It
            concerns :meth:`encode_empty` alone: an empty caption in a batch, as caption dropout
            makes it, is always encoded. A generator trained with caption dropout wants False.
        cache_bytes: Bound on the memory of cached features of both towers together.
        stores: Features on disk for each tower.

    Raises:
        ConfigError: As :class:`SegmentEncoder`, or if the towers do not read the same tokens.
    """

    def __init__(
        self,
        text_model: TextModel,
        tokenizer: CLIPTokenizer,
        text_model_2: TextModel,
        tokenizer_2: CLIPTokenizer,
        *,
        segmenter: Segmenter | None = None,
        policy: SpecialTokenPolicy | None = None,
        token_budget: int = 240,
        long_segments: LongSegments = "cut_further",
        over_budget: OverBudget = "cut",
        layer: int = _SDXL_LAYER,
        pooled: Pooling = "mean",
        force_zeros_for_empty_prompt: bool = True,
        cache_bytes: int = 256 * 2**20,
        stores: tuple[FeatureStore | None, FeatureStore | None] = (None, None),
    ) -> None:
        shares = _share_cache(cache_bytes, text_model, text_model_2)
        super().__init__(
            text_model,
            tokenizer,
            segmenter=segmenter,
            policy=policy,
            token_budget=token_budget,
            long_segments=long_segments,
            over_budget=over_budget,
            layer=layer,
            pooled=pooled,
            cache_bytes=shares[0],
            store=stores[0],
        )
        self.tower_2 = ClipTower(
            text_model_2, tokenizer_2, layer=layer, cache_bytes=shares[1], store=stores[1]
        )
        _check_pair(self.tower, self.tower_2)
        self.width += self.tower_2.width
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Return the negative prompt of classifier-free guidance.

        Returns:
            Zeros, or the encoded empty caption: see ``force_zeros_for_empty_prompt``. The mask is
            the empty caption's. One row expanded to ``batch_size``: do not write to it.
        """
        empty = super().encode_empty(batch_size)
        return _zeros_like(empty) if self.force_zeros_for_empty_prompt else empty

    def segment_features(self, segments: Sequence[str]) -> Tensor:
        """Encode texts to one pooled vector each with the second tower: ``(N, E)``."""
        return self.tower_2.end_states(segments)

    def clear_cache(self) -> None:
        """Forget cached features; needed after writing to ``.data`` of a weight."""
        super().clear_cache()
        self.tower_2.clear_cache()

    def _merge(self, tokens: Sequence[Sequence[SegmentTokens]]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode planned captions with both towers."""
        first_embeds, mask, _ = self._read(self.tower, tokens)
        second_embeds, _, features = self._read(self.tower_2, tokens)
        pooled = pool_segments(tokens, features, self.pooling)
        return torch.cat([first_embeds, second_embeds], dim=-1), mask, pooled


class TruncatedDualEncoder(TruncatedEncoder):
    """Encode whole captions with two towers, cut and padded to the context, as SDXL does.

    ``prompt_embeds`` and ``pooled`` are those of diffusers' ``StableDiffusionXLPipeline``.

    Args:
        text_model: First tower.
        tokenizer: Its tokenizer.
        text_model_2: Second tower.
        tokenizer_2: Its tokenizer.
        layer: See :class:`DualEncoder`.
        force_zeros_for_empty_prompt: See :class:`DualEncoder`.
        cache_bytes: Bound on the memory of cached features of both towers together.

    Raises:
        ConfigError: If the towers do not read the same tokens.
    """

    def __init__(
        self,
        text_model: TextModel,
        tokenizer: CLIPTokenizer,
        text_model_2: TextModel,
        tokenizer_2: CLIPTokenizer,
        *,
        layer: int = _SDXL_LAYER,
        force_zeros_for_empty_prompt: bool = True,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        shares = _share_cache(cache_bytes, text_model, text_model_2)
        super().__init__(text_model, tokenizer, layer=layer, cache_bytes=shares[0])
        self.tower_2 = ClipTower(text_model_2, tokenizer_2, layer=layer, cache_bytes=shares[1])
        _check_pair(self.tower, self.tower_2)
        self.width += self.tower_2.width
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Return the negative prompt of classifier-free guidance: see :class:`DualEncoder`."""
        empty = super().encode_empty(batch_size)
        return _zeros_like(empty) if self.force_zeros_for_empty_prompt else empty

    def clear_cache(self) -> None:
        """Forget cached features; needed after writing to ``.data`` of a weight."""
        super().clear_cache()
        self.tower_2.clear_cache()

    def _read(self, words: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        """Encode fitting word tokens with both towers."""
        first_embeds, _ = read_padded(self.tower, words)
        second_embeds, pooled = read_padded(self.tower_2, words)
        return torch.cat([first_embeds, second_embeds], dim=-1), pooled


def _zeros_like(conditioning: TextConditioning) -> TextConditioning:
    """Replace features by zeros; the mask stays, so that attention always has a token."""
    pooled = conditioning.pooled
    return replace(
        conditioning,
        prompt_embeds=torch.zeros_like(conditioning.prompt_embeds),
        pooled=None if pooled is None else torch.zeros_like(pooled),
    )


def _share_cache(num_bytes: int, first: TextModel, second: TextModel) -> tuple[int, int]:
    """Divide a bound so that both towers can keep the same sequences."""
    widths = first.config.hidden_size, second.config.hidden_size
    share = num_bytes * widths[0] // sum(widths)
    return share, num_bytes - share


def _check_pair(first: ClipTower, second: ClipTower) -> None:
    """Refuse towers that read other tokens, or not as many."""
    if first.context_length != second.context_length:
        raise ConfigError(
            f"both text towers must have one context; got {first.context_length} and "
            f"{second.context_length} tokens; choose models that belong together"
        )
    if first.tokenizer.get_vocab() != second.tokenizer.get_vocab():
        raise ConfigError(
            "both tokenizers must have one vocabulary; got two; pass those that belong to the model"
        )
