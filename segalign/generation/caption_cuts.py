"""How many captions a pipeline of diffusers cuts at the context of its text encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

# Tokenizers without a limit have one of about 1e30.
_UNLIMITED = 10**6


@dataclass(frozen=True)
class CaptionCuts:
    """What one tokenizer's encoder does not read.

    Attributes:
        context: Tokens that it reads, special ones included.
        num_cut: Captions that are longer.
        num_captions: All captions.
    """

    context: int
    num_cut: int
    num_captions: int


def count_caption_cuts(
    pipeline: DiffusionPipeline, arguments: Mapping[str, Any], captions: Sequence[str]
) -> dict[str, CaptionCuts]:
    """Count the captions that are cut, by tokenizer.

    Args:
        pipeline: The pipeline.
        arguments: Arguments of its call, defaults included.
        captions: The captions.
    """
    counts = {}
    for name, tokenizer in pipeline.components.items():
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        context = _context(tokenizer, arguments)
        if context < _UNLIMITED:
            num_cut = sum(_length(tokenizer, caption) > context for caption in captions)
            counts[name] = CaptionCuts(context, num_cut, len(captions))
    return counts


def _context(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> int:
    """CLIP has a context of its own; other encoders read what the call says."""
    limit = None if isinstance(tokenizer, CLIPTokenizer) else arguments.get("max_sequence_length")
    return int(limit or tokenizer.model_max_length)


def _length(tokenizer: PreTrainedTokenizerBase, caption: str) -> int:
    return len(tokenizer(caption, truncation=False, verbose=False)["input_ids"])
