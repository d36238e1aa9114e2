"""Counter-based randomness: every draw is a pure function of integers.

Nothing here owns a state, so a resumed run, another number of ranks or an evaluation in between
cannot change a draw.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor


def counter_seed(purpose: str, *counters: int) -> int:
    """Hash a purpose and counters to a seed in [0, 2**63).

    Args:
        purpose: Name of the draw, so that two uses of the same counters are independent.
        *counters: Integers (seed, step, sample id, ...), each in the int64 range.
    """
    packed = purpose.encode() + b"\0" + struct.pack(f"<{len(counters)}q", *counters)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def counter_uniform(purpose: str, *counters: int) -> float:
    """Draw a number from U[0, 1) that depends on nothing but the arguments."""
    return (counter_seed(purpose, *counters) >> 10) / 2**53


def counter_normal(purpose: str, counters: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Draw standard normal noise, one independent sample per row of counters.

    Args:
        purpose: Name of the draw.
        counters: One tuple of integers for each row.
        shape: Shape of one row.

    Returns:
        Float32 CPU tensor of shape ``(len(counters), *shape)``. A row depends on its own counters
        alone, so it is the same in any batch.
    """
    noise = torch.empty(len(counters), *shape)
    for row, row_counters in zip(noise, counters, strict=True):
        generator = torch.Generator().manual_seed(counter_seed(purpose, *row_counters))
        row.normal_(generator=generator)
    return noise
