"""Images that a validation step has made, for all who look at them.

Dims: B images, H/W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from segalign.diffusion.generator import Weights

# Where a validation step's outputs hold them.
MADE_IMAGES = "made_images"


@dataclass(frozen=True, eq=False)
class MadeImages:
    """Images of a batch's captions, and how they were made.

    Attributes:
        images: Float in [0, 1], ``(B, 3, H, W)``.
        eval_seed: Seed of their noise.
        weights: The weights that made them.
    """

    images: Tensor
    eval_seed: int
    weights: Weights


def shared_images(outputs: object, eval_seed: int, weights: Weights) -> Tensor | None:
    """Look for the very images that are wanted, lest they are made again.

    Args:
        outputs: What a validation step returned.
        eval_seed: Seed of the noise that is wanted.
        weights: The weights that are wanted.

    Returns:
        Images ``(B, 3, H, W)``, or None if there are others or none.
    """
    made = outputs.get(MADE_IMAGES) if isinstance(outputs, Mapping) else None
    if not isinstance(made, MadeImages):
        return None
    return made.images if (made.eval_seed, made.weights) == (eval_seed, weights) else None
