"""A value for each image of an evaluation, brought together over ranks as plain data.

Dims: B images of a micro-batch, N images of the plan.
"""

from collections.abc import Mapping

from torch import Tensor

from segalign.metrics.score_groups import finite, mean
from segalign.ranks import gather_objects


class PlaceValues:
    """Columns of numbers by the place of the image; images that do not count have none."""

    def __init__(self) -> None:
        self._own: dict[str, dict[int, float]] = {}

    def add(self, places: Tensor, counted: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Take in a micro-batch.

        Args:
            places: Place of each image, int64 ``(B,)``.
            counted: Which of them count, bool ``(B,)``.
            columns: Numbers by name, ``(B,)`` each; kept in float64.
        """
        rows = counted.nonzero().flatten().tolist()
        numbers = places.tolist()
        for name, column in columns.items():
            values = column.double().tolist()
            self._own.setdefault(name, {}).update({numbers[row]: values[row] for row in rows})

    def join(self, num_images: int) -> dict[str, list[float | None]]:
        """Join the ranks, every one of which must call this.

        Args:
            num_images: N.

        Returns:
            By name, in the order of names, a value for each place; None where there is none.
        """
        parts = gather_objects(self._own)
        joined: dict[str, list[float | None]] = {}
        for name in sorted({name for part in parts for name in part}):
            found = {place: v for part in parts for place, v in part.get(name, {}).items()}
            joined[name] = [found.get(place) for place in range(num_images)]
        return joined


def means(columns: Mapping[str, list[float | None]]) -> dict[str, float]:
    """Average each column over its finite values; columns without any are left out."""
    return {name: mean(kept) for name, values in columns.items() if (kept := finite(values))}
