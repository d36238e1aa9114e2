"""The noise that sampling steps inject, as a function of the noise that sampling starts from.

Dims: B batch, c/h/w latents.
"""

import functools
import hashlib
from collections.abc import Callable

from torch import Tensor

from segalign.rng import counter_normal


def following_noise(start: Tensor) -> Callable[[int], Tensor]:
    """Derive the noise of all steps, row by row, so that a start alone decides an image.

    Nothing is computed before a step asks.

    Args:
        start: The starting noise, ``(B, c, h, w)``.

    Returns:
        Step index, 0 = noisiest, to standard normal noise ``(B, c, h, w)``; the same when asked
        again, and for a row in any batch.
    """

    @functools.cache
    def seeds() -> list[int]:
        rows = start.detach().float().cpu().contiguous().numpy()
        digests = [hashlib.sha256(row.tobytes()).digest() for row in rows]
        return [int.from_bytes(digest[:8], "big", signed=True) for digest in digests]

    def noise(step_index: int) -> Tensor:
        counters = [(seed, step_index) for seed in seeds()]
        return counter_normal("following noise", counters, start.shape[1:]).to(start)

    return noise
