"""Rows of all ranks, with gradients.

Dims: N rows of this rank, M rows of all ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from segalign.ranks import is_distributed


class _GatherRows(torch.autograd.Function):
    """Concatenate equally many rows of every rank; the gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)  # autograd's own stays
        distributed.all_reduce(total)
        first = distributed.get_rank() * int(ctx.num_rows)
        return total[first : first + ctx.num_rows]


def gather_sizes(sizes: Sequence[int], device: torch.device) -> list[list[int]]:
    """Tell every rank the sizes of all ranks, one list for each size; one collective for all."""
    if not is_distributed():
        return [[size] for size in sizes]
    table = torch.zeros(len(sizes), distributed.get_world_size(), dtype=torch.int64, device=device)
    table[:, distributed.get_rank()] = torch.tensor(sizes, device=device)
    distributed.all_reduce(table)
    return [[int(size) for size in row] for row in table.tolist()]


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Concatenate the rows of all ranks, ``(N, ...)`` to ``(M, ...)``, in rank order.

    The result carries gradient: a row gets the sum of what all ranks' losses ask of it. Where each
    rank's loss is a mean over its own samples and gradients are averaged over ranks, this is the
    gradient of the joined batch. Every rank must call it, forward and backward, equally often.

    Args:
        rows: Rows of this rank.
        counts: Number of rows of each rank: see ``gather_sizes``.
    """
    if len(counts) == 1:
        return rows
    widest = max(counts)
    padding = rows.new_zeros(widest - len(rows), *rows.shape[1:])
    gathered = _GatherRows.apply(torch.cat([rows, padding]))
    assert isinstance(gathered, Tensor)
    kept = [gathered[rank * widest :][:count] for rank, count in enumerate(counts)]
    return torch.cat(kept)
