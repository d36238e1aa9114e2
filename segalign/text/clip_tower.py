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
from segalign.text.lru_cache import LruCache
from segalign.text.passes import plan_passes
from segalign.text.text_states import TextModel, check_model, text_states
from segalign.text.tokenizer import TokenIds, word_token_ids

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
        width_step: Lengths are rounded up to a multiple of this. Small: less padding; large:
            fewer passes.
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
        width_step: int = 4,
        max_pass_tokens: int = 8192,
    ) -> None:
        super().__init__()
        self.text_model = text_model
        self.tokenizer = tokenizer
        self.layer = layer
        self.store = store
        self.width_step = width_step
        self.max_pass_tokens = max_pass_tokens
        self.context_length: int = text_model.config.max_position_embeddings
        self.width: int = text_model.config.hidden_size
        self._features: LruCache[tuple[TokenIds, str], tuple[Tensor, Tensor]] = LruCache(
            cache_bytes
        )
        self._word_ids: LruCache[str, TokenIds] = LruCache(_MAX_CACHED_TEXTS)
        self._weight_versions: tuple[tuple[int, int], ...] = ()
        check_model(text_model, tokenizer, layer)
        self._forget_stale()

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
        return self._features.cost

    def clear_cache(self) -> None:
        """Forget cached features.

        Changes of weights by an optimizer, by ``load_state_dict``, by moves and casts are noticed;
        call this after writing to ``.data`` of a weight.
        """
        self._features.clear()

    def word_ids(self, text: str) -> TokenIds:
        """Return the word tokens of a text, without start and end, of any number."""
        token_ids = self._word_ids.get(text)
        if token_ids is None:
            token_ids = word_token_ids(text, self.tokenizer)
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
        if not self._may_keep():
            return self._encode(distinct)
        self._forget_stale()
        found = self._look_up(distinct)
        missing = [sequence for sequence in distinct if sequence not in found]
        if missing:
            with torch.no_grad():
                encoded = self._encode(missing)
            for sequence in missing:
                pooled = encoded.pooled[encoded.pooled_rows[sequence]]
                found[sequence] = self._keep(sequence, encoded[sequence].clone(), pooled.clone())
        return TokenFeatures(
            rows=torch.cat([found[sequence][0] for sequence in distinct]),
            first_rows=dict(zip(distinct, accumulate(map(len, distinct), initial=0), strict=False)),
            pooled=torch.stack([found[sequence][1] for sequence in distinct]),
            pooled_rows={sequence: row for row, sequence in enumerate(distinct)},
        )

    def end_states(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, cut at the context, to their pooled features, ``(N, E)``."""
        sequences = [self.wrap(self.word_ids(text)[: self.max_word_tokens]) for text in texts]
        features: TokenFeatures = self(sequences)
        numbers = [features.pooled_rows[sequence] for sequence in sequences]
        return features.pooled[torch.tensor(numbers, device=features.pooled.device)]

    def _look_up(self, sequences: Sequence[TokenIds]) -> dict[TokenIds, tuple[Tensor, Tensor]]:
        """Find features in the cache, or else in the store."""
        dtype = self._autocast_dtype()
        found = {}
        for sequence in sequences:
            features = self._features.get((sequence, dtype))
            if features is None and self.store is not None:
                stored = self.store.get(sequence)
                if stored is not None:
                    features = self._keep(sequence, *map(self._like_weights, stored))
            if features is not None:
                found[sequence] = features
        return found

    def _keep(self, sequence: TokenIds, rows: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Put features into the cache."""
        key = sequence, self._autocast_dtype()
        self._features.put(key, (rows, pooled), rows.nbytes + pooled.nbytes)
        return rows, pooled

    def _like_weights(self, stored: Tensor) -> Tensor:
        """Bring a stored tensor to the model's device and number type, in memory of its own."""
        return stored.to(self.text_model.device, self.text_model.dtype, copy=True)

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
        return torch.split(
            flat.to(self.text_model.device, non_blocking=True), [len(array) for array in arrays]
        )

    def _may_keep(self) -> bool:
        """Tell whether features may be kept: no gradient through the model, and no dropout."""
        has_dropout = self.text_model.training and bool(self.text_model.config.attention_dropout)
        trainable = any(weight.requires_grad for weight in self.text_model.parameters())
        if has_dropout or (trainable and torch.is_grad_enabled()):
            self._refuse_store()
            return False
        return self.store is not None or self._features.max_cost > 0

    def _forget_stale(self) -> None:
        """Clear the cache and check the store anew if a weight changed since the last look."""
        versions = self._versions()
        if versions != self._weight_versions:
            self.clear_cache()
            if self.store is not None:
                self.store.check(self.text_model, self.layer)
            self._weight_versions = versions

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """Identify the weights and their contents, as far as PyTorch counts changes."""
        return tuple(
            (id(weight), 0 if weight.is_inference() else weight._version)
            for weight in self.text_model.parameters()
        )

    def _autocast_dtype(self) -> str:
        """Name the dtype that autocast computes in, or return an empty string."""
        device_type = self.text_model.device.type
        if not torch.is_autocast_enabled(device_type):
            return ""
        return str(torch.get_autocast_dtype(device_type))

    def _apply(self, fn: Any, recurse: bool = True) -> "ClipTower":
        """Move or cast the model; cached features stay behind, the store stays valid."""
        self._forget_stale()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.clear_cache()
        self._weight_versions = self._versions()
        return self

    def _refuse_store(self) -> None:
        """Refuse a store beside a model whose features change."""
        if self.store is not None:
            raise ConfigError(
                "a feature store serves a frozen text model; this one is trained or has dropout; "
                "freeze it or use no store"
            )
