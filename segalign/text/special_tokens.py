"""What becomes of start, end and padding tokens when segments are merged.

Dims: S tokens of a prompt, D text width.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from segalign.errors import ConfigError
from segalign.text.tokenizer import TokenIds

StartPolicy = Literal["keep", "first"]
EndPolicy = Literal["drop", "keep"]
PadPolicy = Literal["pad_star", "eos"]


@dataclass(frozen=True, kw_only=True)
class SpecialTokenPolicy:
    """Treatment of special tokens in the merged sequence; the defaults are the paper's choice.

    The naive concatenation that the paper compares with is ``end="keep", pad="eos"``.

    Attributes:
        start: Keep the start token of every segment, or only of the ``first``.
        end: Drop or keep the end token of every segment.
        pad: Fill up with ``pad_star``, the mean of the last positions of the encoded and padded
            empty prompt, or with the empty prompt's encoded end token (``eos``).
        num_pad_positions: Positions that ``pad_star`` averages (official: 60).
        drop_pad_words: Also drop words that share their id with the padding. The official code
            does; it matters only where the pad token is an ordinary one, as ``!`` in Stable
            Diffusion 2.

    Reference: arXiv 2410.11817, section 3.
    """

    start: StartPolicy = "keep"
    end: EndPolicy = "drop"
    pad: PadPolicy = "pad_star"
    num_pad_positions: int = 60
    drop_pad_words: bool = False

    def __post_init__(self) -> None:
        """Check the choices."""
        choices = {"start": StartPolicy, "end": EndPolicy, "pad": PadPolicy}
        for name, choice in choices.items():
            if (value := getattr(self, name)) not in get_args(choice):
                known = ", ".join(f"`{option}`" for option in get_args(choice))
                raise ConfigError(f"`policy.{name}` must be one of {known}; got {value!r}")
        if self.num_pad_positions < 1:
            raise ConfigError(
                f"`policy.num_pad_positions` must be at least 1; got {self.num_pad_positions}; "
                "the official value is 60"
            )


def kept_positions(
    input_ids: TokenIds, policy: SpecialTokenPolicy, pad_token_id: int, *, is_first: bool
) -> NDArray[np.int64]:
    """List the positions of one encoded segment that stay in the merged sequence.

    Args:
        input_ids: Start token, words, end token.
        policy: The policy.
        pad_token_id: Id of the padding.
        is_first: Whether it is the first segment of its caption.

    Returns:
        Increasing positions into ``input_ids``, int64.
    """
    keep = np.ones(len(input_ids), dtype=bool)
    keep[0] = is_first or policy.start == "keep"
    keep[-1] = policy.end == "keep"
    if policy.drop_pad_words:
        keep[1:-1] &= np.asarray(input_ids[1:-1]) != pad_token_id
    return np.flatnonzero(keep)


def count_kept(
    word_ids: TokenIds, policy: SpecialTokenPolicy, pad_token_id: int, *, is_first: bool
) -> int:
    """Count the tokens of one segment that stay in the merged sequence.

    Args:
        word_ids: Its words, without start and end.
        policy: The policy.
        pad_token_id: Id of the padding.
        is_first: Whether it is the first segment of its caption.

    Returns:
        The number of positions that :func:`kept_positions` lists of the encoded segment.
    """
    num_words = len(word_ids)
    if policy.drop_pad_words:
        num_words -= word_ids.count(pad_token_id)
    return num_words + (is_first or policy.start == "keep") + (policy.end == "keep")


def padding_vector(empty_prompt_states: Tensor, policy: SpecialTokenPolicy) -> Tensor:
    """Compute the vector that fills a merged sequence up.

    Args:
        empty_prompt_states: The encoded empty prompt, padded to the context: ``(S, D)``.
        policy: The policy; ``num_pad_positions`` must be at most S.

    Returns:
        Vector ``(D,)``, same dtype; carries gradient.

    Reference: arXiv 2410.11817; official code: mean over the last 60 of 77 positions.
    """
    if policy.pad == "eos":
        return empty_prompt_states[1]
    return empty_prompt_states[-policy.num_pad_positions :].mean(dim=0)
