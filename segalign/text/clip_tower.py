"""A CLIP text tower that encodes token sequences once each, in few passes.

Dims: N distinct sequences, S tokens of a sequence, T rows of the result, D text width, E width of
pooled features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.feature_store import FeatureStore
from segalign.text.frozen_features import (
    FrozenFeatures,
    WeightVersions,
    execution_device,
    is_constant,
    weight_versions,
)
from segalign.text.lru_cache import LruCache
from segalign.text.passes import plan_passes
from segalign.text.text_states import TextModel, check_model, text_states
from segalign.text.tokenizer import TextCleaning, TokenIds, word_token_ids

_MAX_CACHED_TEXTS = 65_536
_MAX_CACHED_CHARS = 2048


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Features of distinct token sequences, stored one below the other.

    Attributes:
        rows: Features of all tokens, ``(T, D)``. Rows between sequences may hold padding.
        first_rows: Row of each sequence's first token.
        pooled: End-token state of each sequence, ``(N, E)``: after the final layer norm whatever
            the layer of ``rows``, and mapped by the model's projection if it has one.
        pooled_rows: Row of each sequence in ``pooled``.
    """

    rows: Tensor
    first_rows: dict[TokenIds, int]
    pooled: Tensor
    pooled_rows: dict[TokenIds, int]

    def __getitem__(self, sequence: TokenIds) -> Tensor:
        """Return the features of one sequence, ``(S, D)``."""
        first = self.first_rows[sequence]
        return self.rows[first : first + len(sequence)]


class ClipTower(nn.Module):
    """Encode token sequences with a CLIP text model; a sequence's features depend on it alone.

    The model is causal, so padding on the right cannot influence a token and no attention mask
    is needed. A sequence is always padded to the same width (its length rounded up), whatever it
    is batched with: on the CPU its features are then the same to the last bit in every batch and
    with or without the cache, so that a resumed run, whose cache is empty, repeats the straight
    one.

    Args:
        text_model: The model; trainable or frozen.
        tokenizer: Its tokenizer.
        layer: Layer that the features of tokens are read from: -1 is after the final layer norm;
            -2 the last layer but one, as in SDXL.
        cache_bytes: Bound on the memory of cached features of a frozen model, on its device.
        store: Features of a frozen model on disk, asked for what the cache lacks.
        cleaning: Repair of texts before they are tokenized: see ``clean_text``.
        width_step: Lengths are rounded up to a multiple of this. Small: less padding; large:
            fewer passes. Without multiples of 4 features are equal but for the last bits: the
            CPU's kernels add up 3, 5 or 6 rows in another order than many.
        max_pass_tokens: Bound on rows times width of one pass.

    Raises:
        ConfigError: If the model lacks the layer, knows fewer tokens than the tokenizer, or is not
            the frozen one that the store was made with.
    """

    def __init__(
        self,
        text_model: TextModel,
        tokenizer: CLIPTokenizer,
        *,
        layer: int = -1,
        cache_bytes: int = 256 * 2**20,
        store: FeatureStore | None = None,
        cleaning: TextCleaning = "ftfy",
        width_step: int = 4,
        max_pass_tokens: int = 8192,
    ) -> None:
        super().__init__()
        self.text_model = text_model
        self.tokenizer = tokenizer
        self.layer = layer
        self.store = store
        self.cleaning: TextCleaning = cleaning
        self.width_step = width_step
        self.max_pass_tokens = max_pass_tokens
        self.context_length: int = text_model.config.max_position_embeddings
        self.width: int = text_model.config.hidden_size
        self._cache_bytes = cache_bytes
        self._features: FrozenFeatures[TokenIds, tuple[Tensor, Tensor]] = FrozenFeatures(
            cache_bytes
        )
        self._word_ids: LruCache[str, TokenIds] = LruCache(_MAX_CACHED_TEXTS)
        self._checked_versions: WeightVersions = ()
        check_model(text_model, tokenizer, layer)
        self._check_store()

    @property
    def max_word_tokens(self) -> int:
        """Word tokens that fit the context besides start and end."""
        return self.context_length - 2

    @property
    def pad_token_id(self) -> int:
        """Id of the padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def cached_bytes(self) -> int:
        """Bytes of features in the cache."""
        return self._features.num_bytes

    def clear_cache(self) -> None:
        """Forget cached features: see :meth:`FrozenFeatures.clear` for when it is needed."""
        self._features.clear()

    def word_ids(self, text: str) -> TokenIds:
        """Return the word tokens of a text, without start and end, of any number."""
        token_ids = self._word_ids.get(text)
        if token_ids is None:
            token_ids = word_token_ids(text, self.tokenizer, self.cleaning)
            self._word_ids.put(text, token_ids, 1 if len(text) <= _MAX_CACHED_CHARS else 2**62)
        return token_ids

    def count_word_tokens(self, text: str) -> int:
        """Count the word tokens of a text."""
        return len(self.word_ids(text))

    def wrap(self, word_ids: TokenIds, *, padded: bool = False) -> TokenIds:
        """Put start and end around word tokens, and padding up to the context if asked."""
        ids = (int(self.tokenizer.bos_token_id), *word_ids, int(self.tokenizer.eos_token_id))
        return ids + (self.pad_token_id,) * (self.context_length - len(ids) if padded else 0)

    def forward(self, sequences: Iterable[TokenIds]) -> TokenFeatures:
        """Encode token sequences, equal ones once.

        Args:
            sequences: Sequences with start and end, 2 to ``context_length`` ids each.

        Returns:
            Their features. They carry gradient if the model is trainable and gradients are
            enabled.

        Raises:
            ValueError: If there is no sequence.
            ConfigError: If the model is trainable, or no longer the store's, and there is a store.
        """
        distinct = list(dict.fromkeys(sequences))
        if not distinct:
            raise ValueError("expected at least one text; got none")
        if not self._has_fixed_features():
            return self._encode(distinct)
        if self.store is None and self._cache_bytes == 0:
            return self._encode(distinct)
        self._check_store()
        pairs = self._features.encode(
            self.text_model,
            distinct,
            self._encode_pairs,
            dropout=self._dropout,
            look_up=None if self.store is None else self._stored_pair,
        )
        return TokenFeatures(
            rows=torch.cat([rows for rows, _ in pairs]),
            first_rows=dict(zip(distinct, accumulate(map(len, distinct), initial=0), strict=False)),
            pooled=torch.stack([pooled for _, pooled in pairs]),
            pooled_rows={sequence: row for row, sequence in enumerate(distinct)},
        )

    def end_states(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, cut at the context, to their pooled features, ``(N, E)``."""
        sequences = [self.wrap(self.word_ids(text)[: self.max_word_tokens]) for text in texts]
        features: TokenFeatures = self(sequences)
        numbers = [features.pooled_rows[sequence] for sequence in sequences]
        return features.pooled[torch.tensor(numbers, device=features.pooled.device)]

    def _stored_pair(self, sequence: TokenIds) -> tuple[Tensor, Tensor] | None:
        """Read states and pooled features from the store, in the model's number type."""
        stored = None if self.store is None else self.store.get(sequence)
        if stored is None:
            return None
        place = execution_device(self.text_model), self.text_model.dtype
        rows, pooled = stored
        return rows.to(*place, copy=True), pooled.to(*place, copy=True)

    def _encode_pairs(self, sequences: Sequence[TokenIds]) -> list[tuple[Tensor, Tensor]]:
        """Encode distinct sequences to views of their states and pooled features."""
        encoded = self._encode(sequences)
        return [(encoded[one], encoded.pooled[encoded.pooled_rows[one]]) for one in sequences]

    def _encode(self, sequences: Sequence[TokenIds]) -> TokenFeatures:
        """Encode distinct sequences, in a few passes."""
        passes = plan_passes(
            sequences,
            context_length=self.context_length,
            width_step=self.width_step,
            max_pass_tokens=self.max_pass_tokens,
            pad_token_id=self.pad_token_id,
        )
        end_token_id = int(self.tokenizer.eos_token_id)
        ids = self._on_device([one.grid.ravel() for one in passes])
        ends = self._on_device([one.end_positions(end_token_id) for one in passes])
        rows: list[Tensor] = []
        pooled: list[Tensor] = []
        first_rows: dict[TokenIds, int] = {}
        num_rows = 0
        for one, pass_ids, pass_ends in zip(passes, ids, ends, strict=True):
            states, final = text_states(self.text_model, pass_ids.view(one.grid.shape), self.layer)
            rows.append(states.flatten(0, 1))
            pooled.append(final.flatten(0, 1)[pass_ends])
            for sequence, first in zip(one.members, one.first_positions(), strict=True):
                first_rows[sequence] = num_rows + first
            num_rows += one.grid.size
        pooled_rows = {sequence: row for row, sequence in enumerate(first_rows)}
        return TokenFeatures(torch.cat(rows), first_rows, torch.cat(pooled), pooled_rows)

    def _on_device(self, arrays: Sequence[NDArray[np.int64]]) -> tuple[Tensor, ...]:
        """Move arrays to the model's device, in one transfer."""
        flat = torch.from_numpy(np.concatenate(arrays))
        moved = flat.to(execution_device(self.text_model), non_blocking=True)
        return torch.split(moved, [len(array) for array in arrays])

    @property
    def _dropout(self) -> float:
        return self.text_model.config.attention_dropout or 0.0

    def _has_fixed_features(self) -> bool:
        """Tell whether another pass would give the same; refuse a store where it would not."""
        is_fixed = is_constant(self.text_model, self._dropout)
        if self.store is not None and not is_fixed:
            raise ConfigError(
                "a feature store serves a frozen text model; this one is trained or has dropout; "
                "freeze it or use no store"
            )
        return is_fixed

    def _check_store(self) -> None:
        """See that the store is the model's, if a weight changed since the last look."""
        if self.store is None:
            return
        versions = weight_versions(self.text_model)
        if versions != self._checked_versions:
            self.store.check(self.text_model, self.layer)
            self._checked_versions = versions

    def _apply(self, fn: Any, recurse: bool = True) -> "ClipTower":
        """Move or cast the model; cached features stay behind, the store stays valid."""
        self._check_store()
        self.clear_cache()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._checked_versions = weight_versions(self.text_model)
        return self
