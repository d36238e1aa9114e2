"""Kernels, and the squared distance of two distributions that they define.

Dims: m and n rows of two sets, d features.

Reference: Gretton et al., A Kernel Two-Sample Test, JMLR 13 (2012), equations 3 and 5.
"""

from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from segalign.errors import DataError

Estimator = Literal["unbiased", "biased"]
_BLOCK: Final = 2048


class Kernel(Protocol):
    """A kernel k(x, y) on features.

    Attributes:
        scale: Factor on distances, to make them readable.
    """

    scale: float

    def prepare(self, rows: Tensor) -> Tensor:
        """Turn features ``(n, d)`` into what the kernel compares, float64 ``(n, d)``."""
        ...

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Compare prepared rows, ``(m, d)`` and ``(n, d)``; returns ``(m, n)``."""
        ...

    def protocol(self) -> dict[str, Any]:
        """Say what the kernel is, as plain data."""
        ...


class PolynomialKernel:
    """(gamma x.y + coefficient)^degree: KID, by default.

    Args:
        degree: At least 1.
        gamma: Factor on the inner product; None is 1 / d.
        coefficient: Added to it.

    Reference: arXiv 1801.01401.
    """

    scale = 1.0

    def __init__(
        self, degree: int = 3, gamma: float | None = None, coefficient: float = 1.0
    ) -> None:
        self.degree = degree
        self.gamma = gamma
        self.coefficient = coefficient

    def prepare(self, rows: Tensor) -> Tensor:
        """Take features as they are."""
        return rows.double()

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Compare rows."""
        gamma = 1 / first.shape[1] if self.gamma is None else self.gamma
        return (first @ second.T * gamma + self.coefficient) ** self.degree

    def protocol(self) -> dict[str, Any]:
        """Say what the kernel is."""
        gamma = "1/d" if self.gamma is None else self.gamma
        numbers = {"degree": self.degree, "gamma": gamma, "coefficient": self.coefficient}
        return {"name": "polynomial", **numbers}


class GaussianKernel:
    """exp(-|x - y|^2 / (2 sigma^2)) on features of length 1, times 1000: CMMD, by default.

    The paper's estimator is unbiased; its published code uses the biased one, which is larger by
    about (2 - k) / n. Choose the estimator in ``KernelDistance``.

    Args:
        sigma: Bandwidth.
        scale: Factor on distances.

    Reference: arXiv 2401.09603.
    """

    def __init__(self, sigma: float = 10.0, scale: float = 1000.0) -> None:
        self.sigma = sigma
        self.scale = scale

    def prepare(self, rows: Tensor) -> Tensor:
        """Scale features to length 1."""
        return F.normalize(rows.double(), dim=1)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Compare rows."""
        squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
        return torch.exp((first @ second.T * 2 - squares) / (2 * self.sigma**2))

    def protocol(self) -> dict[str, Any]:
        """Say what the kernel is."""
        return {"name": "gaussian", "sigma": self.sigma, "scale": self.scale, "unit": True}


def squared_distance(
    first: Tensor, second: Tensor, kernel: Kernel, estimator: Estimator = "unbiased"
) -> Tensor:
    """Estimate the squared maximum mean discrepancy, times the kernel's scale, block by block.

    Args:
        first: Features ``(m, d)``.
        second: Features ``(n, d)``.
        kernel: The kernel.
        estimator: ``unbiased`` leaves out pairs of a row with itself, and can be negative.

    Returns:
        float64 scalar.

    Raises:
        DataError: If a set has fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise DataError(
            "expected at least 2 images on each side of a kernel distance; got "
            f"{len(first)} and {len(second)}; add images"
        )
    first, second = kernel.prepare(first), kernel.prepare(second)
    across = torch.zeros((), dtype=torch.float64)
    for rows in torch.split(first, _BLOCK):
        for others in torch.split(second, _BLOCK):
            across = across + kernel(rows, others).sum()
    means = [_mean_within(rows, kernel, estimator) for rows in (first, second)]
    return kernel.scale * (means[0] + means[1] - 2 * across / (len(first) * len(second)))


def _mean_within(rows: Tensor, kernel: Kernel, estimator: Estimator) -> Tensor:
    """Return the mean of the kernel over pairs of rows; blocks above the diagonal count twice."""
    blocks = torch.split(rows, _BLOCK)
    diagonal = torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for number, block in enumerate(blocks):
        own = kernel(block, block)
        diagonal = diagonal + own.diagonal().sum()
        total = total + (own.sum() - own.diagonal().sum())
        for later in blocks[number + 1 :]:
            total = total + 2 * kernel(block, later).sum()
    count = len(rows)
    if estimator == "unbiased":
        return total / (count * (count - 1))
    return (total + diagonal) / count**2
