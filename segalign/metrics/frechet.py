"""The Frechet distance of two Gaussians, in float64.

Dims: d features.

Reference: arXiv 1706.08500, equation 6: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
"""

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from segalign.errors import DataError

_JITTER: Final = 1e-12
_BLOCKS: Final = 4
# Eigenvalues of a product of covariances are not negative; rounding makes them so by 1e-13 or less
# of the largest.
_ROUNDING: Final = 1e-9


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Return the squared Frechet distance, as it comes.

    Nothing is clamped: for equal Gaussians rounding can leave a small number of either sign.

    Args:
        mean1: ``(d,)``.
        cov1: Covariance ``(d, d)``; may be singular.
        mean2: Mean of the other.
        cov2: Covariance of the other.

    Returns:
        float64 scalar.

    Raises:
        DataError: If a covariance is not finite, or has negative eigenvalues.
    """
    difference = mean1.double() - mean2.double()
    cov1, cov2 = cov1.double(), cov2.double()
    traces = cov1.trace() + cov2.trace()
    return difference @ difference + traces - 2 * trace_of_root(cov1, cov2)


def trace_of_root(cov1: Tensor, cov2: Tensor) -> Tensor:
    """Return tr (S1 S2)^(1/2).

    With S1 = L L^T, the eigenvalues of S1 S2 are those of L^T S2 L, which is symmetric: one
    decomposition, without the eigenvectors. The side that is better conditioned is factored, in
    whatever order they come, so that the jitter that a singular one needs does no harm.

    Args:
        cov1: Covariance, float64 ``(d, d)``.
        cov2: Another.

    Raises:
        DataError: If one is not finite, or has negative eigenvalues.
    """
    if not (torch.isfinite(cov1).all() and torch.isfinite(cov2).all()):
        raise DataError(
            "expected finite covariances; got NaN or infinity; check the extractor's weights and "
            "dtype, and reference statistics"
        )
    factor1, condition1 = _cholesky(cov1)
    factor2, condition2 = _cholesky(cov2)
    if condition1 < condition2:
        factor1, cov1, cov2 = factor2, cov2, cov1
    if factor1 is None:
        factor = _eigen_factor(cov1)
        product = factor.T @ cov2 @ factor
    else:
        product = _lower_congruence(factor1, cov2)
    values: Tensor = torch.linalg.eigvalsh(product, UPLO="L")
    _check_not_negative(values)
    return values.clamp(min=0).sqrt().sum()


def _cholesky(covariance: Tensor) -> tuple[Tensor | None, float]:
    """Factor S + 1e-12 mean(diag S) I; return L and how well conditioned it is, or None and 0."""
    scale = covariance.diagonal().mean()
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(covariance + _JITTER * scale * eye)
    if failed.item():
        return None, 0.0
    return factor, (factor.diagonal().min().square() / scale).item()


def _lower_congruence(factor: Tensor, matrix: Tensor) -> Tensor:
    """Return the lower triangle of L^T S L, for a lower triangular L and a symmetric S.

    In blocks, of which those above the diagonal are neither used nor made: half of the products.
    """
    size = len(factor)
    edges = [size * block // _BLOCKS for block in range(_BLOCKS + 1)]
    spans = [slice(*pair) for pair in pairwise(edges)]
    right = torch.cat([matrix[:, s.start :] @ factor[s.start :, s] for s in spans], dim=1)
    product = torch.zeros_like(matrix)
    for s in spans:
        product[s, : s.stop] = factor[s.start :, s].T @ right[s.start :, : s.stop]
    return product


def _eigen_factor(covariance: Tensor) -> Tensor:
    """Factor S = L L^T by its eigenvectors, also where Cholesky's way fails."""
    values, vectors = torch.linalg.eigh(covariance)
    _check_not_negative(values)
    factor: Tensor = vectors * values.clamp(min=0).sqrt()
    return factor


def _check_not_negative(values: Tensor) -> None:
    """Refuse eigenvalues, in rising order, that are more negative than rounding makes them.

    Raises:
        DataError: If there are such.
    """
    if values[0] < -_ROUNDING * values[-1].abs():
        raise DataError(
            f"expected covariances, without negative eigenvalues; got {values[0].item():.3g} below "
            f"a largest of {values[-1].item():.3g}; compute the statistics again"
        )
