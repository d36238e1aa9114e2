"""Whole captions encoded by a T5 encoder, and adapted to the width of a generator.

Dims: B captions, N distinct ones, L token budget, D width of the result, F width of T5.

Reference: arXiv 2410.11817; the T5 branch of its generators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from segalign.errors import ConfigError
from segalign.text.adapter import TextAdapter, check_adapter_widths
from segalign.text.conditioning import CaptionEncoder, TextConditioning, TextReport
from segalign.text.frozen_features import FrozenFeatures, execution_device
from segalign.text.tokenizer import TokenIds


class T5Encoder(CaptionEncoder):
    """Encode whole captions with T5, then an adapter.

    Every caption is padded to L, whatever it is batched with, and equal ones are encoded once.
    Features of a frozen T5 are kept before the adapter, so a trainable adapter gets the same
    gradient with and without the cache. A frozen T5 always evaluates: its dropout stays off in
    training mode.

    Args:
        model: The encoder, trainable or frozen, of any precision.
        tokenizer: Its tokenizer; captions end with its ``</s>``.
        adapter: Maps features from F to D, in its own precision; None leaves them as they are.
        token_budget: L, tokens of a caption with ``</s>`` (official: 240).
        attend_to_padding: Let T5 see the padding, as the official generator expects. It matters:
            without it the features of words differ by half their norm.
        cache_bytes: Bound on the memory of cached features, on T5's device; 0 caches nothing. One
            caption of T5-large takes 1 MB in float32.
        captions_per_pass: Bound on the captions of one pass.

    Raises:
        ConfigError: If the budget is not positive, or widths or vocabularies do not fit.
    """

    def __init__(
        self,
        model: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: TextAdapter | None = None,
        token_budget: int = 240,
        attend_to_padding: bool = True,
        cache_bytes: int = 256 * 2**20,
        captions_per_pass: int = 32,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.token_budget = token_budget
        self.attend_to_padding = attend_to_padding
        self.captions_per_pass = captions_per_pass
        self.width: int = model.config.d_model if adapter is None else adapter.out_dim
        self._features: FrozenFeatures[TokenIds, Tensor] = FrozenFeatures(cache_bytes)
        self._check_settings()
        self._keep_frozen_model_evaluating()

    @property
    def cached_bytes(self) -> int:
        """Bytes of features in the cache."""
        return self._features.num_bytes

    def forward(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions.

        Args:
            captions: B captions of any length.

        Returns:
            Conditioning of length L. The mask is True at tokens up to and with ``</s>``;
            ``pooled`` is None; a caption is one segment, cut if it exceeds the budget. The dtype is
            the adapter's, or T5's without one.
        """
        if not captions:
            raise ValueError("expected at least one caption; got none")
        tokens = [self.token_ids(caption) for caption in captions]
        kept = [self._cut(ids) for ids in tokens]
        features = self._features.encode(
            self.model, kept, self._encode, dropout=self.model.config.dropout_rate
        )
        states = torch.stack(features)
        lengths = tuple(map(len, kept))
        dropped = tuple(len(ids) - length for ids, length in zip(tokens, lengths, strict=True))
        return TextConditioning(
            prompt_embeds=states if self.adapter is None else self.adapter(states),
            attention_mask=self._mask(lengths),
            pooled=None,
            report=TextReport(
                num_segments=(1,) * len(captions),
                cut_segments=tuple(int(count > 0) for count in dropped),
                dropped_tokens=dropped,
                kept_tokens=lengths,
            ),
            num_leading=max(lengths),
        )

    def clear_cache(self) -> None:
        """Forget cached features: see :meth:`FrozenFeatures.clear` for when it is needed."""
        self._features.clear()

    def token_ids(self, caption: str) -> TokenIds:
        """Return all tokens of a caption, with ``</s>`` at the end, of any number."""
        # One text at a time: as fast as a batch, and it starts no threads that a later fork meets.
        encoded = self.tokenizer(encodable_text(caption), verbose=False)
        return tuple(encoded["input_ids"])

    def train(self, mode: bool = True) -> "T5Encoder":
        """Switch modes, but for a frozen T5: that always evaluates."""
        super().train(mode)
        self._keep_frozen_model_evaluating()
        return self

    def _keep_frozen_model_evaluating(self) -> None:
        if not any(weight.requires_grad for weight in self.model.parameters()):
            self.model.train(False)

    def _cut(self, token_ids: TokenIds) -> TokenIds:
        """Cut tokens to the budget; the last one stays ``</s>``."""
        if len(token_ids) <= self.token_budget:
            return token_ids
        return (*token_ids[: self.token_budget - 1], token_ids[-1])

    def _encode(self, sequences: Sequence[TokenIds]) -> list[Tensor]:
        """Encode distinct token sequences to features, ``(L, F)`` each."""
        size = self.captions_per_pass
        passes = [sequences[start : start + size] for start in range(0, len(sequences), size)]
        return [features for group in passes for features in self._encode_pass(group)]

    def _encode_pass(self, sequences: Sequence[TokenIds]) -> Tensor:
        """Encode token sequences in one pass, ``(N, L, F)``."""
        ids = torch.full((len(sequences), self.token_budget), int(self.tokenizer.pad_token_id))
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        mask = None if self.attend_to_padding else self._mask([len(ids) for ids in sequences])
        output = self.model(input_ids=ids.to(execution_device(self.model)), attention_mask=mask)
        features: Tensor = output.last_hidden_state
        return features

    def _mask(self, lengths: Sequence[int]) -> Tensor:
        """Mark the first columns of each row, bool ``(N, L)``."""
        positions = torch.arange(self.token_budget)
        return (positions < torch.tensor(lengths).unsqueeze(1)).to(execution_device(self.model))

    def _apply(self, fn: object, recurse: bool = True) -> "T5Encoder":
        """Move or cast the model; cached features stay behind."""
        self.clear_cache()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _check_settings(self) -> None:
        """Refuse settings that cannot work."""
        if self.token_budget < 1:
            raise ConfigError(
                f"T5's `token_budget` must be at least 1; got {self.token_budget}; "
                "the official value is 240"
            )
        expected, found = len(self.tokenizer), self.model.config.vocab_size
        if found < expected:
            raise ConfigError(
                f"the T5 model must know the tokenizer's {expected} tokens; its vocabulary has "
                f"{found}; pass the tokenizer that belongs to the model"
            )
        if self.adapter is not None:
            check_adapter_widths(self.adapter, t5_width=self.model.config.d_model)


def encodable_text(text: str) -> str:
    """Make a caption acceptable to a tokenizer, changing nothing that is.

    T5 reads raw captions. Only what is no text at all is repaired: NUL is left out, halves of a
    surrogate pair are joined, and a lone half becomes U+FFFD.
    """
    text = text.replace("\0", "")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
