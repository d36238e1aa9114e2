"""The text of a rollout: captions and negative prompt, made ready once for all steps.

Dims: B captions, L text tokens, D text width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segalign.text.conditioning import TextConditioning, TextReport


@dataclass(frozen=True, eq=False)
class GuidedText:
    """Conditioning as a network takes it at every step: the same tensors each time.

    Attributes:
        positive: Of the ``B`` captions.
        negative: Of the negative prompt, ``B`` rows; None where it is not called on its own.
        pair: Both, ``2B`` rows, those of the captions first; None where they are not joined.
            ``positive`` is a view of its first rows, then.
    """

    positive: TextConditioning
    negative: TextConditioning | None
    pair: TextConditioning | None

    @classmethod
    def prepare(
        cls,
        positive: TextConditioning,
        negative: TextConditioning | None,
        *,
        dtype: torch.dtype,
        masked: bool,
        paired: bool,
    ) -> "GuidedText":
        """Cast, leave out what is masked in all rows, and join.

        Args:
            positive: Of the ``B`` captions.
            negative: Of the negative prompt; None without guidance.
            dtype: Precision of the network.
            masked: Whether the network sees the mask.
            paired: Join both where that changes nothing: texts of one shape, no row all masked.
        """
        if negative is not None and paired and _can_join(positive, negative, masked):
            pair = _ready(_join(positive, negative), dtype, masked)
            return cls(_first_rows(pair, len(positive.prompt_embeds)), None, pair)
        ready = None if negative is None else _ready(negative, dtype, masked)
        return cls(_ready(positive, dtype, masked), ready, None)


def _ready(text: TextConditioning, dtype: torch.dtype, masked: bool) -> TextConditioning:
    """Do once what calls of the network would do at every step."""
    if masked:
        text = text.without_masked_tail()
    # Trimming makes a new tensor of the same text, which must not happen at each call.
    return replace(text, prompt_embeds=text.prompt_embeds.to(dtype), num_leading=None)


def _can_join(positive: TextConditioning, negative: TextConditioning, masked: bool) -> bool:
    """Tell whether rows of both can be in one call and see what they see on their own."""
    if positive.prompt_embeds.shape != negative.prompt_embeds.shape:
        return False
    if (positive.pooled is None) != (negative.pooled is None):
        return False
    # A row without tokens attends to all columns alike, so that their number would matter.
    masks = torch.cat([positive.attention_mask, negative.attention_mask])
    return not masked or bool(masks.any(dim=1).all())


def _join(positive: TextConditioning, negative: TextConditioning) -> TextConditioning:
    """Put captions and negative prompt one below the other."""
    leading = (positive.num_leading, negative.num_leading)
    counts = (vars(positive.report), vars(negative.report))
    return TextConditioning(
        torch.cat([positive.prompt_embeds, negative.prompt_embeds]),
        torch.cat([positive.attention_mask, negative.attention_mask]),
        _cat(positive.pooled, negative.pooled),
        TextReport(**{name: counts[0][name] + counts[1][name] for name in counts[0]}),
        None if leading[0] is None or leading[1] is None else max(leading[0], leading[1]),
    )


def _first_rows(text: TextConditioning, num_rows: int) -> TextConditioning:
    """Take the first rows, without copying."""
    return replace(
        text,
        prompt_embeds=text.prompt_embeds[:num_rows],
        attention_mask=text.attention_mask[:num_rows],
        pooled=None if text.pooled is None else text.pooled[:num_rows],
        report=TextReport(**{name: count[:num_rows] for name, count in vars(text.report).items()}),
    )


def _cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])
