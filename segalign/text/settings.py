"""How a config describes the text encoding of a generator."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.adapter import TextAdapter, check_adapter_widths, load_adapter
from segalign.text.caption_plan import LongSegments, OverBudget
from segalign.text.conditioning import TextConditioner
from segalign.text.dual_encoder import DualEncoder, TruncatedDualEncoder
from segalign.text.feature_store import FeatureStore
from segalign.text.joined_encoder import JoinedEncoder
from segalign.text.merging import Pooling
from segalign.text.segment_encoder import SegmentEncoder
from segalign.text.segmenter import Segmenter
from segalign.text.special_tokens import SpecialTokenPolicy
from segalign.text.t5_encoder import T5Encoder
from segalign.text.t5_models import load_t5
from segalign.text.text_models import TextModels
from segalign.text.truncated_encoder import TruncatedEncoder

Context = Literal["clip", "t5", "clip+t5"]


@dataclass(frozen=True, kw_only=True)
class T5Branch:
    """Where a T5 and its adapter come from, and how they read a caption.

    Args:
        model: Local folder or hub id; with ``init: random`` a size, ``large`` or ``tiny``.
        init: Read the weights, or draw them: to measure size, memory and speed.
        adapter: Folder or hub id of an adapter; null starts a fresh one.
        train_adapter: Whether the adapter learns.
        token_budget: Tokens of a caption (official: 240).
        attend_to_padding: Let T5 see the padding, as the official model does.
        dtype: Precision of the frozen T5. The adapter is float32.
        cache_megabytes: Bound on the memory of T5's cached features; a caption takes 1 MB of
            T5-large in float32.
    """

    model: str = "google-t5/t5-large"
    init: Literal["pretrained", "random"] = "pretrained"
    adapter: str | None = None
    train_adapter: bool = True
    token_budget: int = 240
    attend_to_padding: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache_megabytes: int = 256

    def load(self, width: int) -> T5Encoder:
        """Read T5 and the adapter to a generator that reads ``width`` features per token."""
        model, tokenizer = load_t5(self.model, init=self.init, dtype=getattr(torch, self.dtype))
        t5_width = int(model.config.d_model)
        if self.adapter is None:
            # The hidden width of LaVi-Bridge's adapter: between both, 896 for 1024 and 768.
            adapter = TextAdapter(t5_width, (t5_width + width) // 2, width)
        else:
            adapter = load_adapter(self.adapter)
            check_adapter_widths(adapter, t5_width=t5_width, generator_width=width)
        model.requires_grad_(False)
        adapter.requires_grad_(self.train_adapter)
        return T5Encoder(
            model,
            tokenizer,
            adapter=adapter,
            token_budget=self.token_budget,
            attend_to_padding=self.attend_to_padding,
            cache_bytes=self.cache_megabytes * 2**20,
        )


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """Settings of the text encoding.

    Args:
        kind: ``segments`` encodes each segment alone and merges them; ``truncated`` encodes the
            caption whole and loses what does not fit the encoder's context.
        context: What the generator reads: CLIP's features, those of T5 on the whole caption, or
            both, one after the other.
        segmenter: Splitting strategy; null splits into sentences.
        policy: Treatment of special tokens.
        token_budget: Length of CLIP's merged sequence (official: 240).
        long_segments: What becomes of a segment that does not fit the context.
        over_budget: What becomes of a caption that does not fit the budget: ``cut`` at its end, or
            every segment keeps a share, ``proportional`` to its length.
        mask_padding: Hide padding from the generator. The official model sees it.
        cache_megabytes: Bound on the memory of cached features of a frozen CLIP.
        feature_store: Folder of precomputed features (``shards encode``).
        feature_store_2: The same for SDXL's second tower.
        pooled: For SDXL, the pooled features of a caption: the ``mean`` over its segments, or those
            of the ``first``.
        force_zeros_for_empty_prompt: For SDXL, the negative prompt is zeros, as its base model
            wants; a model trained with caption dropout wants false.
        t5: The T5 branch, for a ``context`` with T5; null if the model brings its own.
    """

    kind: Literal["segments", "truncated"] = "segments"
    context: Context = "clip"
    segmenter: Segmenter | None = None
    policy: SpecialTokenPolicy = field(default_factory=SpecialTokenPolicy)
    token_budget: int = 240
    long_segments: LongSegments = "cut_further"
    over_budget: OverBudget = "cut"
    mask_padding: bool = False
    cache_megabytes: int = 256
    feature_store: str | None = None
    feature_store_2: str | None = None
    pooled: Pooling = "mean"
    force_zeros_for_empty_prompt: bool = True
    t5: T5Branch | None = None

    def complete(self, models: TextModels, width: int) -> TextModels:
        """Load the T5 branch if the context needs it and the model has none.

        Args:
            models: The text models of a generator.
            width: Features per token that the generator reads.

        Raises:
            ConfigError: If there is no T5 to load.
        """
        if self.context == "clip" or models.t5 is not None:
            return models
        if self.t5 is None:
            raise ConfigError(
                f"expected `text.t5` for `text.context: {self.context}`; got none; name a T5 "
                "there, or choose `context: clip`"
            )
        return replace(models, t5=self.t5.load(width))

    def build(self, models: TextModels) -> TextConditioner:
        """Make the encoder around the text models, as :meth:`complete` returns them.

        Raises:
            ConfigError: If the model lacks what the settings need, or a setting has no effect.
        """
        self._check_stores(models)
        parts: list[Any] = []
        if self.context != "t5":
            parts.append(self._clip(models))
        if self.context != "clip":
            if models.t5 is None:
                raise ConfigError(
                    f"expected a model with T5 for `text.context: {self.context}`; it has none; "
                    "choose `context: clip`"
                )
            parts.append(models.t5)
        return parts[0] if len(parts) == 1 else JoinedEncoder(parts)

    def _check_stores(self, models: TextModels) -> None:
        """Refuse feature stores that nothing would read."""
        reads_segments = self.kind == "segments" and self.context != "t5"
        named = {"feature_store": reads_segments}
        named["feature_store_2"] = reads_segments and models.text_model_2 is not None
        for name, is_read in named.items():
            if getattr(self, name) is not None and not is_read:
                raise ConfigError(
                    f"expected no `text.{name}`, since nothing would read it; got "
                    f"`{getattr(self, name)}`; leave it out, or let "
                    f"{'two CLIP towers' if name.endswith('2') else 'CLIP'} read segments"
                )

    def _clip(self, models: TextModels) -> TextConditioner:
        """Make the encoder around one CLIP tower, or SDXL's two."""
        if models.text_model_2 is not None and models.tokenizer_2 is not None:
            return self._dual(models, models.text_model_2, models.tokenizer_2)
        cache_bytes = self.cache_megabytes * 2**20
        if self.kind == "truncated":
            return TruncatedEncoder(models.text_model, models.tokenizer, cache_bytes=cache_bytes)
        return SegmentEncoder(
            models.text_model,
            models.tokenizer,
            store=_open_store(self.feature_store),
            **self._segment_settings(),
        )

    def _dual(
        self,
        models: TextModels,
        text_model_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
    ) -> TextConditioner:
        zeros, cache_bytes = self.force_zeros_for_empty_prompt, self.cache_megabytes * 2**20
        towers = (models.text_model, models.tokenizer, text_model_2, tokenizer_2)
        if self.kind == "truncated":
            return TruncatedDualEncoder(
                *towers, force_zeros_for_empty_prompt=zeros, cache_bytes=cache_bytes
            )
        return DualEncoder(
            *towers,
            stores=(_open_store(self.feature_store), _open_store(self.feature_store_2)),
            force_zeros_for_empty_prompt=zeros,
            **self._segment_settings(),
        )

    def _segment_settings(self) -> dict[str, Any]:
        return {
            "segmenter": self.segmenter,
            "policy": self.policy,
            "token_budget": self.token_budget,
            "long_segments": self.long_segments,
            "over_budget": self.over_budget,
            "pooled": self.pooled,
            "cache_bytes": self.cache_megabytes * 2**20,
        }


def _open_store(folder: str | None) -> FeatureStore | None:
    return None if folder is None else FeatureStore.open(folder)
