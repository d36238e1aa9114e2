"""Bring rows of all ranks together in host memory, any number from each.

Dims: n rows of this rank.
"""

from typing import Any, Final

import torch
from torch import Tensor, distributed

_DTYPES: Final = (torch.int64, torch.float32)
_MAX_TRAILING_DIMS: Final = 3
_CHUNK_BYTES: Final = 16 * 2**20


def gather_to_host(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Gather rows to the host memory of every rank; a ``dist_sync_fn`` of torchmetrics.

    They travel in chunks, so that a GPU holds little of them at a time. A rank without rows takes
    part; the type and width of what it holds do not matter.

    Args:
        rows: int64 or float32 ``(n, ...)``, with the same trailing dimensions on all ranks.
        group: Process group; None is that of all ranks.

    Returns:
        The rows of each rank in the order of ranks, on the CPU.
    """
    device = transport_device(group)
    headers = _all_gather(_header(rows).to(device), group)
    counts = [int(header[0]) for header in headers]
    if not any(counts):
        return [rows[:0].cpu()] * len(counts)
    known = next(header.tolist() for header in headers if header[0])
    dtype, shape = _DTYPES[known[1]], known[3 : 3 + known[2]]
    own = rows if len(rows) else torch.empty((0, *shape), dtype=dtype)
    gathered = [torch.empty((count, *shape), dtype=dtype) for count in counts]
    step = max(_CHUNK_BYTES // max(own[:1].nbytes, gathered[0][:1].nbytes, 1), 1)
    for start in range(0, max(counts), step):
        length = min(step, max(counts) - start)
        part = own[start : start + length].to(device)
        padded = part.new_zeros((length, *shape))
        padded[: len(part)] = part
        for whole, received in zip(gathered, _all_gather(padded, group), strict=True):
            room = len(whole[start : start + length])
            whole[start : start + length] = received[:room].cpu()
    return gathered


def _header(rows: Tensor) -> Tensor:
    """Describe rows: their number, type, trailing dimensions."""
    shape = list(rows.shape[1:])
    padding = [0] * (_MAX_TRAILING_DIMS - len(shape))
    return torch.tensor([len(rows), _DTYPES.index(rows.dtype), len(shape), *shape, *padding])


def _all_gather(tensor: Tensor, group: Any) -> list[Tensor]:
    gathered = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(gathered, tensor, group=group)
    return gathered


def transport_device(group: Any) -> torch.device:
    """Return the device that the group's backend sends from: the CPU where it can."""
    if "cpu:" in distributed.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
