"""Make images of captions of which some may fail: the others are made all the same.

Dims: B images of a micro-batch, H/W pixels.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.diffusion.generator import ImageGenerator, Weights
from segalign.errors import ConfigError
from segalign.evaluation.pixels import check_images, outside_range

_MAX_MESSAGE = 200
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A caption that no image could be made of.

    Attributes:
        row: Its place in the micro-batch.
        error: The exception's type.
        message: The first line of what it says, cut at 200 characters.
    """

    row: int
    error: str
    message: str


def attempt(
    generator: ImageGenerator,
    captions: Sequence[str],
    sample_ids: Sequence[int],
    seeds: Sequence[int],
    weights: Weights = "raw",
    *,
    can_retry: bool = True,
    is_first: bool = False,
) -> tuple[Tensor | None, list[Failure]]:
    """Make a micro-batch; if that fails, make its rows one at a time.

    A row that is made alone stands at its own place, all other places filled with it, so that the
    shape of the batch and with it the row's pixels stay what they are. An image that leaves [0, 1]
    has failed too.

    Args:
        generator: Makes the images.
        captions: ``B`` captions.
        sample_ids: ``B`` sample ids.
        seeds: ``B`` seeds.
        weights: The weights that make them.
        can_retry: False where making an image needs other ranks, as with sharded models: these
            would not make the further attempts, so the first failure is raised.
        is_first: Take an error that all rows, of 2 captions or more, raise in the same words for
            one of the settings, and give up.

    Returns:
        Images ``(B, 3, H, W)`` in [0, 1], NaN in rows that fail alone, or None if all do; and the
        failures, by row.

    Raises:
        ConfigError: If memory runs out, or a setting is wrong; it would be so for every caption.
    """
    rows = list(zip(captions, sample_ids, seeds, strict=True))
    try:
        images = check_images(generator.generate(captions, sample_ids, seeds, weights))
    except Exception as error:
        _raise_if_general(error, len(rows))
        if not can_retry:
            raise
        what = _describe(0, error)
        _logger.warning(
            "%d images could not be made (%s: %s); they are made one at a time",
            len(rows),
            what.error,
            what.message,
        )
    else:
        return _without_strays(dict(enumerate(images)), [], len(rows))
    made: dict[int, Tensor] = {}
    failures = []
    for place, row in enumerate(rows):
        try:
            made[place] = _make_alone(generator, row, place, len(rows), weights)
        except Exception as error:  # noqa: BLE001 - whatever a pipeline raises is recorded
            _raise_if_general(error, len(rows))
            failures.append(_describe(place, error))
    if is_first and not made and len(set(captions)) > 1:
        _raise_if_same(failures)
    return _without_strays(made, failures, len(rows))


def _make_alone(
    generator: ImageGenerator,
    row: tuple[str, int, int],
    place: int,
    batch_size: int,
    weights: Weights,
) -> Tensor:
    """Make one row at its place of a full batch."""
    caption, sample_id, seed = row
    images = generator.generate(
        [caption] * batch_size, [sample_id] * batch_size, [seed] * batch_size, weights
    )
    return check_images(images)[place]


def _raise_if_general(error: Exception, batch_size: int) -> None:
    """Raise what no other caption would escape: settings, memory, a device that is lost.

    Raises:
        ConfigError: If memory has run out.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_cpu_memory(error):
        raise ConfigError(
            f"expected {batch_size} images at a time to fit the memory; got {type(error).__name__}."
            " Lower the evaluation's `batch_size`, or set a `dtype` of 16 bits."
        ) from error
    if isinstance(error, ConfigError | torch.AcceleratorError):
        raise error


def _raise_if_same(failures: Sequence[Failure]) -> None:
    """Raise what all rows fail with, where that is one thing.

    Raises:
        ConfigError: If it is.
    """
    first = failures[0]
    if all((one.error, one.message) == (first.error, first.message) for one in failures):
        text = f"{first.error}: {first.message}".rstrip(":. ")
        raise ConfigError(
            f"expected a model that makes images of at least some captions; all {len(failures)} of "
            f"the first micro-batch have failed with {text}; correct the settings of the model"
        )


def _is_cpu_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _describe(place: int, error: Exception) -> Failure:
    lines = str(error).strip().splitlines() or [""]
    return Failure(place, type(error).__name__, lines[0].strip()[:_MAX_MESSAGE])


def _without_strays(
    made: dict[int, Tensor], failures: list[Failure], batch_size: int
) -> tuple[Tensor | None, list[Failure]]:
    """Put rows at their places, and NaN at the others and at those that leave [0, 1]."""
    if not made:
        return None, failures
    lost = torch.full_like(next(iter(made.values())), torch.nan)
    images = torch.stack([made.get(place, lost) for place in range(batch_size)])
    strays = outside_range(images)
    failures = [*failures, *(_describe(row, error) for row, error in strays.items())]
    if len(failures) == batch_size:
        return None, sorted(failures, key=lambda failure: failure.row)
    images[list(strays)] = torch.nan
    return images, sorted(failures, key=lambda failure: failure.row)
