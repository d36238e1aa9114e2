"""Group token sequences into padded grids, one for each pass through a text model.

Dims: R sequences of a pass, W their padded width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segalign.text.tokenizer import TokenIds


@dataclass(frozen=True, eq=False)
class Pass:
    """Sequences of one padded width.

    Attributes:
        members: The sequences, R of them.
        grid: Their ids, padded on the right, int64 ``(R, W)``.
    """

    members: list[TokenIds]
    grid: NDArray[np.int64]

    def first_positions(self) -> list[int]:
        """Return the positions of the first tokens in the flattened grid."""
        return list(range(0, self.grid.size, self.grid.shape[1]))

    def end_positions(self, end_token_id: int) -> NDArray[np.int64]:
        """Return the positions of the first end token of each sequence in the flattened grid."""
        firsts = self.first_positions()
        ends = (m.index(end_token_id) + f for m, f in zip(self.members, firsts, strict=True))
        return np.fromiter(ends, dtype=np.int64, count=len(firsts))


def plan_passes(
    sequences: Sequence[TokenIds],
    *,
    context_length: int,
    width_step: int,
    max_pass_tokens: int,
    pad_token_id: int,
) -> list[Pass]:
    """Group sequences by length, rounded up; a sequence's width depends on nothing else.

    Args:
        sequences: At most ``context_length`` ids each.
        context_length: Largest width.
        width_step: Widths are multiples of this, or the context.
        max_pass_tokens: Bound on R times W.
        pad_token_id: Id of the padding.
    """
    by_width: dict[int, list[TokenIds]] = {}
    for sequence in sequences:
        width = min(-(-len(sequence) // width_step) * width_step, context_length)
        by_width.setdefault(width, []).append(sequence)
    return [
        Pass(members, _pad(members, width, pad_token_id))
        for width, group in sorted(by_width.items())
        for members in _chunks(group, max(max_pass_tokens // width, 1))
    ]


def _pad(sequences: Sequence[TokenIds], width: int, pad_token_id: int) -> NDArray[np.int64]:
    """Pad sequences to a grid."""
    grid = np.full((len(sequences), width), pad_token_id, dtype=np.int64)
    for row, sequence in zip(grid, sequences, strict=True):
        row[: len(sequence)] = sequence
    return grid


def _chunks(group: list[TokenIds], size: int) -> list[list[TokenIds]]:
    """Cut a list into lists of at most ``size``."""
    return [group[start : start + size] for start in range(0, len(group), size)]
