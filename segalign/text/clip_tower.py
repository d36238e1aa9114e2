"""A CLIP text tower that encodes token sequences once each, in few passes.

Dims: N distinct sequences, S tokens of a sequence, T rows of the result, D text width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.lru_cache import LruCache
from segalign.text.tokenizer import TokenIds, word_token_ids

_MAX_CACHED_TEXTS = 65_536
_MAX_CACHED_CHARS = 2048


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Features of distinct token sequences, stored one below the other.

    Attributes:
        rows: Features of all tokens, ``(T, D)``. Rows between sequences may hold padding.
        first_rows: Row of each sequence's first token.
    """

    rows: Tensor
    first_rows: dict[TokenIds, int]

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
        cache_bytes: Bound on the memory of cached features of a frozen model, on its device.
        width_step: Lengths are rounded up to a multiple of this. Small: less padding; large:
            fewer passes.
        max_pass_tokens: Bound on rows times width of one pass.
    """

    def __init__(
        self,
        text_model: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        cache_bytes: int = 256 * 2**20,
        width_step: int = 4,
        max_pass_tokens: int = 8192,
    ) -> None:
        super().__init__()
        self.text_model = text_model
        self.tokenizer = tokenizer
        self.width_step = width_step
        self.max_pass_tokens = max_pass_tokens
        self.context_length: int = text_model.config.max_position_embeddings
        self.width: int = text_model.config.hidden_size
        self._features: LruCache[tuple[TokenIds, str], Tensor] = LruCache(cache_bytes)
        self._word_ids: LruCache[str, TokenIds] = LruCache(_MAX_CACHED_TEXTS)
        self._weight_versions: tuple[tuple[int, int], ...] = ()
        self._check_vocabulary()

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
            Their features after the final layer norm. They carry gradient if the model is
            trainable and gradients are enabled.

        Raises:
            ValueError: If there is no sequence.
        """
        distinct = list(dict.fromkeys(sequences))
        if not distinct:
            raise ValueError("expected at least one text; got none")
        if not self._may_cache():
            return self._encode(distinct)
        self._forget_stale()
        dtype = self._autocast_dtype()
        found = {sequence: self._features.get((sequence, dtype)) for sequence in distinct}
        missing = [sequence for sequence, features in found.items() if features is None]
        if missing:
            with torch.no_grad():
                encoded = self._encode(missing)
                for sequence in missing:
                    features = found[sequence] = encoded[sequence].clone()
                    self._features.put((sequence, dtype), features, features.nbytes)
        rows = torch.cat([features for features in found.values() if features is not None])
        ends = accumulate(map(len, distinct), initial=0)
        return TokenFeatures(rows, dict(zip(distinct, ends, strict=False)))

    def end_states(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, cut at the context, to the states of their end tokens, ``(N, D)``."""
        sequences = [self.wrap(self.word_ids(text)[: self.max_word_tokens]) for text in texts]
        features: TokenFeatures = self(sequences)
        end_rows = [features.first_rows[sequence] + len(sequence) - 1 for sequence in sequences]
        return features.rows[torch.tensor(end_rows, device=features.rows.device)]

    def _encode(self, sequences: Sequence[TokenIds]) -> TokenFeatures:
        """Encode distinct sequences, in a few passes."""
        passes = self._plan_passes(sequences)
        flat_ids = torch.from_numpy(np.concatenate([grid.ravel() for _, grid in passes]))
        sizes = [grid.size for _, grid in passes]
        ids = torch.split(flat_ids.to(self.text_model.device, non_blocking=True), sizes)
        outputs: list[Tensor] = []
        first_rows: dict[TokenIds, int] = {}
        for (members, grid), grid_ids, first in zip(
            passes, ids, accumulate(sizes, initial=0), strict=False
        ):
            output = self.text_model(input_ids=grid_ids.view(grid.shape))
            outputs.append(output.last_hidden_state.flatten(0, 1))
            first_rows |= {s: first + i * grid.shape[1] for i, s in enumerate(members)}
        return TokenFeatures(torch.cat(outputs), first_rows)

    def _plan_passes(
        self, sequences: Sequence[TokenIds]
    ) -> list[tuple[list[TokenIds], NDArray[np.int64]]]:
        """Group sequences by padded width; return the members and the padded ids of each pass."""
        by_width: dict[int, list[TokenIds]] = {}
        for sequence in sequences:
            width = min(-(-len(sequence) // self.width_step) * self.width_step, self.context_length)
            by_width.setdefault(width, []).append(sequence)
        return [
            (members, self._pad(members, width))
            for width, group in sorted(by_width.items())
            for members in _chunks(group, max(self.max_pass_tokens // width, 1))
        ]

    def _pad(self, sequences: Sequence[TokenIds], width: int) -> NDArray[np.int64]:
        """Pad sequences to a grid."""
        grid = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
        for row, sequence in zip(grid, sequences, strict=True):
            row[: len(sequence)] = sequence
        return grid

    def _may_cache(self) -> bool:
        """Tell whether features may be kept: no gradient through the model, and no dropout."""
        if self._features.max_cost == 0:
            return False
        has_dropout = self.text_model.training and bool(self.text_model.config.attention_dropout)
        trainable = any(weight.requires_grad for weight in self.text_model.parameters())
        return not has_dropout and not (trainable and torch.is_grad_enabled())

    def _forget_stale(self) -> None:
        """Clear the cache if a weight changed since the last look."""
        versions = tuple(
            (id(weight), 0 if weight.is_inference() else weight._version)
            for weight in self.text_model.parameters()
        )
        if versions != self._weight_versions:
            self.clear_cache()
            self._weight_versions = versions

    def _autocast_dtype(self) -> str:
        """Name the dtype that autocast computes in, or return an empty string."""
        device_type = self.text_model.device.type
        if not torch.is_autocast_enabled(device_type):
            return ""
        return str(torch.get_autocast_dtype(device_type))

    def _apply(self, fn: Any, recurse: bool = True) -> "ClipTower":
        """Move or cast the model; cached features stay behind."""
        self.clear_cache()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _check_vocabulary(self) -> None:
        """Refuse a model whose vocabulary is smaller than its tokenizer's."""
        expected, found = len(self.tokenizer), self.text_model.config.vocab_size
        if found < expected:
            raise ConfigError(
                f"the text model must know the tokenizer's {expected} tokens; its vocabulary has "
                f"{found}; pass the tokenizer that belongs to the model"
            )


def _chunks(group: list[TokenIds], size: int) -> list[list[TokenIds]]:
    """Cut a list into lists of at most ``size``."""
    return [group[start : start + size] for start in range(0, len(group), size)]
