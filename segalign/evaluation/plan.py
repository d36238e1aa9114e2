"""Who makes which images of an evaluation: decided before it starts, by integers alone.

The plan cuts the images into micro-batches first and deals those out to ranks. So an image is made
in the same company for any number of ranks, and with equal kernels its pixels are the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from segalign.errors import ConfigError


@dataclass(frozen=True)
class PlannedBatch:
    """A micro-batch of one rank.

    Attributes:
        index: Its number in the plan.
        places: Place of each image in the plan, ``batch_size`` of them, those of a caption beside
            each other. Padding repeats places.
        counted: Which of them count; each place does so once, over all batches and ranks.
    """

    index: int
    places: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """Images to make: ``images_per_caption`` of each caption.

    The place of the j-th image of the i-th caption is ``i * images_per_caption + j``.

    Args:
        num_captions: Captions, at least 1.
        images_per_caption: Images of each, which differ in their noise.
        batch_size: Images made at a time on each rank; a multiple of ``images_per_caption``.

    Raises:
        ConfigError: If the numbers do not fit.
    """

    num_captions: int
    images_per_caption: int = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.num_captions < 1:
            raise ConfigError("expected captions to evaluate on; got none. Set `data.val_shards`.")
        if self.batch_size % self.images_per_caption:
            raise ConfigError(
                "expected `batch_size` of the evaluation to be a multiple of `images_per_caption` "
                f"({self.images_per_caption}), so that images of a caption are made together; got "
                f"{self.batch_size}. Change one of them."
            )

    @property
    def num_images(self) -> int:
        """Images that count."""
        return self.num_captions * self.images_per_caption

    @property
    def num_batches(self) -> int:
        """Micro-batches, over all ranks."""
        return -(-self.num_images // self.batch_size)

    def num_own(self, rank: int, world_size: int) -> int:
        """Count the images of a rank that count."""
        return sum(sum(batch.counted) for batch in self.batches(rank, world_size))

    def batches(self, rank: int, world_size: int) -> Iterator[PlannedBatch]:
        """List a rank's micro-batches: equally many, of equal size, on every rank."""
        for turn in range(-(-self.num_batches // world_size)):
            index = turn * world_size + rank
            yield self._batch(min(index, self.num_batches - 1), is_own=index < self.num_batches)

    def _batch(self, index: int, *, is_own: bool) -> PlannedBatch:
        first = index * self.batch_size
        last_caption = self.num_images - self.images_per_caption
        places = tuple(
            place if place < self.num_images else last_caption + place % self.images_per_caption
            for place in range(first, first + self.batch_size)
        )
        counted = (
            is_own and place < self.num_images for place in range(first, first + len(places))
        )
        return PlannedBatch(index, places, tuple(counted))
