"""Several text encoders side by side: their tokens one behind the other.

Dims: B captions, L token budget, D text width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segalign.errors import ConfigError
from segalign.text.conditioning import TextConditioner, TextConditioning, TextReport
from segalign.text.segmenter import Segment


class JoinedEncoder(nn.Module):
    """Concatenate what several encoders make of the same captions, along the tokens.

    The official generator joins 240 tokens of CLIP and 240 of T5, in this order. Widths must
    agree; where dtypes differ, the wider one is the result's.

    Args:
        parts: The encoders, in order.

    Raises:
        ConfigError: If there is none, or their widths differ.
    """

    def __init__(self, parts: Sequence[TextConditioner]) -> None:
        super().__init__()
        if not parts:
            raise ConfigError("expected at least one text encoder to join; got none; name one")
        first = parts[0]
        for part in parts[1:]:
            if part.width != first.width:
                raise ConfigError(
                    f"expected text encoders of one width; `{type(first).__name__}` gives "
                    f"{first.width} and `{type(part).__name__}` {part.width}; "
                    "give T5 an adapter to the generator's width"
                )
        self.width = first.width
        self.token_budget = sum(part.token_budget for part in parts)
        self.parts = nn.ModuleList(parts)  # type: ignore[arg-type]  # encoders are modules

    @property
    def tower(self) -> nn.Module:
        """The text tower of the first part that has one."""
        tower: nn.Module = self._of_first_part("tower")
        return tower

    @property
    def split(self) -> Callable[[str], list[Segment]]:
        """The segmentation of the first part that has one."""
        split: Callable[[str], list[Segment]] = self._of_first_part("split")
        return split

    def forward(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions with every part.

        Args:
            captions: B captions.

        Returns:
            Conditioning of length L, the sum of the parts'. ``pooled`` is that of the first part
            that has one. In the report, segments and their cuts are counted by the part whose
            segments :attr:`split` gives (else the first part); kept and dropped tokens are sums
            over the parts, so a word that one part drops and another keeps counts in both.
        """
        return self._join([part(captions) for part in self.parts])

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Encode the empty caption, the negative prompt of classifier-free guidance.

        Returns:
            Conditioning whose tensors are one row expanded to ``batch_size``: do not write to it.
        """
        return self._join([part.encode_empty(1) for part in self._encoders()]).expand(batch_size)

    def clear_cache(self) -> None:
        """Forget the cached features of every part."""
        for part in self._encoders():
            part.clear_cache()

    def _encoders(self) -> Iterable[Any]:
        """Return the parts as encoders."""
        return self.parts

    def _of_first_part(self, name: str) -> Any:
        """Return an attribute of the first part that has it."""
        for part in self.parts:
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"no part of this `JoinedEncoder` has `{name}`")

    def _join(self, parts: Sequence[TextConditioning]) -> TextConditioning:
        """Put the parts' tokens one behind the other."""
        pooled: list[Tensor] = [part.pooled for part in parts if part.pooled is not None]
        return TextConditioning(
            prompt_embeds=torch.cat([part.prompt_embeds for part in parts], dim=1),
            attention_mask=torch.cat([part.attention_mask for part in parts], dim=1),
            pooled=pooled[0] if pooled else None,
            report=self._join_reports([part.report for part in parts]),
        )

    def _join_reports(self, reports: Sequence[TextReport]) -> TextReport:
        """Count segments once and tokens of all parts."""
        splits = [hasattr(part, "split") for part in self.parts]
        segments = reports[splits.index(True) if any(splits) else 0]
        return TextReport(
            num_segments=segments.num_segments,
            cut_segments=segments.cut_segments,
            dropped_tokens=_sum_by_caption(report.dropped_tokens for report in reports),
            kept_tokens=_sum_by_caption(report.kept_tokens for report in reports),
        )


def _sum_by_caption(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*counts, strict=True)))
