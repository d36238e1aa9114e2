"""Work that one process does for all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from segalign.errors import DataError
from segalign.metrics.host_gather import transport_device


def on_first_rank(function: Callable[[], Tensor], count: int, group: Any = None) -> Tensor:
    """Run a function on the first rank of a group and hand its result to all others.

    For heavy linear algebra on equal data. It saves the others the work, which would share the
    processor, and gives equal bits on all ranks even if their machines or thread counts differ.

    Args:
        function: Returns ``count`` float64 numbers. If it raises, so does every rank.
        count: How many.
        group: Process group; None is that of all ranks.

    Returns:
        The numbers, float64 ``(count,)``, on the CPU.

    Raises:
        DataError: On the other ranks, if the first one has failed.
    """
    device = transport_device(group)
    message = torch.full((1 + count,), torch.nan, dtype=torch.float64)
    is_first = distributed.get_rank(group) == 0
    try:
        if is_first:
            message[1:] = function()
            message[0] = 1
    finally:  # the others wait for it, whatever happens
        sent = message.to(device)
        distributed.broadcast(sent, group=group, group_src=0)
    message = sent.cpu()
    if message[0] != 1:
        raise DataError(
            "expected the first rank to compute a metric; it has failed; see the error of that rank"
        )
    return message[1:]
