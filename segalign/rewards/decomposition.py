"""Split a preference score into a text-relevant and a text-irrelevant part.

Text features of CLIP-type models lie in a narrow cone around a common direction V. The part of a
score along V tells nothing of the text, and drives over-fitting when it is rewarded. Scores are
linear in the text features, so weighing the parts of a score, or of its gradient, and editing the
features are the same thing.

Dims: B batch, E joint-embedding width.

Reference: arXiv 2410.11817, decomposed preference optimisation.
"""

import math

from torch import Tensor

from segalign.errors import ConfigError, DataError

# Below it, a mean of unit vectors points nowhere in particular.
_MIN_NORM = 1e-6


def common_share(text_features: Tensor, common_direction: Tensor) -> Tensor:
    """Project text features on the common direction: the paper's eta, ``<t, V>``.

    Args:
        text_features: ``(B, E)``; unit vectors, or means of unit vectors.
        common_direction: V, unit vector ``(E,)``.

    Returns:
        Shares ``(B,)``, in [-1, 1]. Carries the gradient of the features.
    """
    return text_features @ common_direction.to(text_features)


def text_irrelevant(text_features: Tensor, common_direction: Tensor) -> Tensor:
    """Return the part of text features along the common direction, ``eta V``: ``(B, E)``."""
    share = common_share(text_features, common_direction)
    return share.unsqueeze(-1) * common_direction.to(text_features)


def text_relevant(text_features: Tensor, common_direction: Tensor) -> Tensor:
    """Return the part of text features orthogonal to the common direction: ``(B, E)``.

    It is not normalised again.
    """
    return text_features - text_irrelevant(text_features, common_direction)


def reweight(text_features: Tensor, common_direction: Tensor, omega: float) -> Tensor:
    """Scale the text-irrelevant part of text features: ``t - (1 - omega) eta V``.

    Args:
        text_features: ``(B, E)``; unit vectors, or means of unit vectors.
        common_direction: V, unit vector ``(E,)``. Never differentiated.
        omega: Factor of the text-irrelevant part, in [0, 1]; 1 keeps the features, 0 removes it.

    Returns:
        Features ``(B, E)``, not normalised again, same dtype.

    Raises:
        ConfigError: If ``omega`` is outside [0, 1].
    """
    if not 0 <= omega <= 1:
        raise ConfigError(f"expected `omega` in [0, 1]; got {omega}; the paper's best is 0.3")
    irrelevant = text_irrelevant(text_features, common_direction.detach())
    return text_features - (1 - omega) * irrelevant


def unit_mean(total: Tensor, count: int) -> Tensor:
    """Normalise a sum of text features to a common direction.

    Args:
        total: Sum of ``count`` features, ``(E,)``.
        count: Their number, at least 1.

    Returns:
        Unit vector ``(E,)``.

    Raises:
        DataError: If the sum is not finite, or the features cancel out.
    """
    mean = total / count
    norm = mean.norm()
    length = norm.item()
    if not math.isfinite(length):
        raise DataError(
            f"expected finite text features for the common direction; the mean of {count} is not; "
            "look for NaN in the model's weights"
        )
    if length < _MIN_NORM:
        raise DataError(
            f"expected text features that share a direction; those of {count} captions cancel out; "
            "use more captions, or another model"
        )
    unit: Tensor = mean / norm
    return unit
