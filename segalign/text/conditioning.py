"""What text encoders hand to a generator.

Dims: B captions, L token budget, D text width, E width of pooled features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class TextReport:
    """Counts per caption, so that no text is ever lost silently.

    Attributes:
        num_segments: Segments after cutting.
        cut_segments: Segments that were longer than the encoder's context.
        dropped_tokens: Tokens that the policy would keep but that did not fit.
        kept_tokens: Tokens in the result, padding not counted.
    """

    num_segments: tuple[int, ...]
    cut_segments: tuple[int, ...]
    dropped_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]

    def totals(self) -> dict[str, int]:
        """Sum each count over the captions."""
        return {name: sum(counts) for name, counts in vars(self).items()}


@dataclass(frozen=True, eq=False)
class TextConditioning:
    """Text features of a batch of captions.

    Attributes:
        prompt_embeds: Features of the tokens, ``(B, L, D)``.
        attention_mask: True at tokens of the caption, False at padding, bool ``(B, L)``. The
            official generator does not use it: it attends to the padding too.
        pooled: One vector per caption, ``(B, E)``, or None where an encoder has none.
        report: Counts per caption.
        num_leading: Number of leading columns outside of which every row is masked, or None where
            tokens may be anywhere.
    """

    prompt_embeds: Tensor
    attention_mask: Tensor
    pooled: Tensor | None
    report: TextReport
    num_leading: int | None = None

    def without_masked_tail(self) -> "TextConditioning":
        """Leave out the trailing columns that every row masks."""
        if self.num_leading is None:
            return self
        return replace(
            self,
            prompt_embeds=self.prompt_embeds[:, : self.num_leading],
            attention_mask=self.attention_mask[:, : self.num_leading],
        )

    def select(self, rows: Tensor) -> "TextConditioning":
        """Take some captions' conditioning, with repetitions; the report stays the batch's.

        Args:
            rows: Which captions, int64 ``(M,)``.
        """
        return replace(
            self,
            prompt_embeds=self.prompt_embeds[rows],
            attention_mask=self.attention_mask[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
        )

    def expand(self, batch_size: int) -> "TextConditioning":
        """Repeat the conditioning of a single caption, without copying.

        Raises:
            ValueError: If it does not hold exactly one caption.
        """
        if len(self.prompt_embeds) != 1:
            raise ValueError(f"only one caption can be expanded; got {len(self.prompt_embeds)}")
        return replace(
            self,
            prompt_embeds=self.prompt_embeds.expand(batch_size, -1, -1),
            attention_mask=self.attention_mask.expand(batch_size, -1),
            pooled=None if self.pooled is None else self.pooled.expand(batch_size, -1),
            report=TextReport(**{k: v * batch_size for k, v in vars(self.report).items()}),
        )


class CaptionEncoder(nn.Module):
    """Base of encoders whose negative prompt is the encoded empty caption."""

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Encode the empty caption, the negative prompt of classifier-free guidance.

        Returns:
            Conditioning whose tensors are one row expanded to ``batch_size``: do not write to it.
        """
        empty: TextConditioning = self([""])
        return empty.expand(batch_size)


class TextConditioner(Protocol):
    """An encoder of captions: the interface that generators, samplers and comparisons use.

    Attributes:
        token_budget: L, the length of the result.
        width: D, the width of the result.
    """

    token_budget: int
    width: int

    def __call__(self, captions: Sequence[str]) -> TextConditioning:
        """Encode a batch of captions."""
        ...

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Encode the empty caption, the negative prompt of classifier-free guidance."""
        ...

    def clear_cache(self) -> None:
        """Forget cached features."""
        ...
