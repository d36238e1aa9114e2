"""Means over seeds, and how far chance may have moved them: Student's intervals of 95 %.

Pure standard library.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final

from segalign.launch.findings.ablation import Interval

CONFIDENCE: Final = 0.95
# Between them lie the quantiles of every number of degrees of freedom, from infinity to 1.
_LOWEST, _HIGHEST = 1.9, 13.0
_NEGLIGIBLE: Final = 1e-18


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its 95 % interval by Student's t.

    Args:
        values: At least one; independent draws of one distribution, about normal.

    Returns:
        The mean. Its ends are NaN of a single value, and where a value is not finite.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("expected at least one value for a mean; got none")
    num = len(values)
    if num < 2 or not all(map(math.isfinite, values)):
        return Interval(mean=sum(values) / num, low=math.nan, high=math.nan, num=num)
    mean = statistics.fmean(values)
    half = t_quantile(num - 1) * statistics.stdev(values) / math.sqrt(num)
    return Interval(mean=mean, low=mean - half, high=mean + half, num=num)


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Interval | None:
    """Return the mean of differences seed by seed, and its 95 % interval.

    What the seeds of both have in common, such as their noise, is not in it.

    Args:
        values: By seed.
        base: What is taken away, by seed.

    Returns:
        Over the seeds that both have with finite values; None if there is none.
    """
    differences = [
        value - base[seed]
        for seed, value in values.items()
        if seed in base and math.isfinite(value) and math.isfinite(base[seed])
    ]
    return mean_interval(differences) if differences else None


def t_quantile(degrees: int) -> float:
    """Return the t that a Student variable stays within, on both sides, in 95 % of draws.

    Args:
        degrees: Of freedom, at least 1.
    """
    low, high = _LOWEST, _HIGHEST
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _central_mass(middle, degrees) < CONFIDENCE else (low, middle)
    return middle


def _central_mass(t: float, degrees: int) -> float:
    """Return the exact probability that a Student variable is within +-t.

    Reference: Abramowitz and Stegun, 26.7.3 and 26.7.4; finite sums for whole degrees.
    """
    angle = math.atan(t / math.sqrt(degrees))
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if degrees > 1 else 0.0
    for factor in range(2 + is_odd, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (factor - 1) / factor
        total += term
        if term < _NEGLIGIBLE:
            break
    mass = math.sin(angle) * total
    return (angle + mass) * 2 / math.pi if is_odd else mass
