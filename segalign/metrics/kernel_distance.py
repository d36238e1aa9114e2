"""The kernel distance between features of real and generated images: KID, CMMD.

Dims: B rows, N images of a side, d features.
"""

from typing import Any, Final, NotRequired, TypedDict

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from segalign.errors import ConfigError, DataError
from segalign.metrics.feature_statistics import check_finite
from segalign.metrics.host_gather import gather_to_host
from segalign.metrics.kernels import Estimator, Kernel, PolynomialKernel, squared_distance
from segalign.metrics.recovering_metric import RecoveringMetric, TooFewImagesError
from segalign.rng import counter_seed

_SIDES: Final = ("real", "generated")


class KernelResult(TypedDict):
    """What the kernel distance found.

    Attributes:
        distance: Over all images, or mean over subsets; float64.
        std: Standard deviation over subsets, with divisor K; only with subsets.
        num_real: Real images, int64.
        num_generated: Generated images, int64.
    """

    distance: Tensor
    std: NotRequired[Tensor]
    num_real: Tensor
    num_generated: Tensor


class KernelDistance(RecoveringMetric):
    """Squared maximum mean discrepancy of features.

    Rows of all ranks are gathered in host memory, sorted by id, and each id is taken once, so that
    any order, chunks and ranks give the same bits. One rank computes the distance for all.

    Args:
        num_features: Width of the features, d.
        kernel: None is KID's.
        real_rows: Features of the real images, float32 ``(N, d)``, in the order of their ids; None
            if they come through ``update``.
        num_subsets: Subsets of each side, drawn by (seed, number), over which the distance is
            averaged, as KID usually is; 0 takes all images once, which says the same with less
            noise.
        subset_size: Images of a subset.
        seed: Seed of the subsets.
        estimator: See ``squared_distance``.
        settings: Those of ``torchmetrics.Metric``.

    Raises:
        ConfigError: If real rows have another width.
    """

    higher_is_better = False
    real_ids: list[Tensor]
    real_features: list[Tensor]
    generated_ids: list[Tensor]
    generated_features: list[Tensor]

    def __init__(
        self,
        num_features: int,
        *,
        kernel: Kernel | None = None,
        real_rows: Tensor | None = None,
        num_subsets: int = 0,
        subset_size: int = 1000,
        seed: int = 0,
        estimator: Estimator = "unbiased",
        **settings: Any,
    ) -> None:
        super().__init__(**{"dist_sync_fn": gather_to_host, **settings})
        if real_rows is not None and real_rows.shape[1:] != (num_features,):
            raise ConfigError(
                f"expected real rows of {num_features} features; got shape "
                f"{tuple(real_rows.shape)}; compute them with the same extractor"
            )
        self.num_features = num_features
        self.kernel = PolynomialKernel() if kernel is None else kernel
        self.real_rows = real_rows
        self.num_subsets = num_subsets
        self.subset_size = subset_size
        self.seed = seed
        self.estimator: Estimator = estimator
        for side in _SIDES:
            self.add_state(f"{side}_ids", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_features", [], dist_reduce_fx="cat")

    @override
    def update(
        self, features: Tensor, sample_ids: Tensor, counted: Tensor, *, real: bool = False
    ) -> None:
        """Add a batch; rows are kept in host memory as float32.

        Args:
            features: ``(B, d)``.
            sample_ids: int64 ``(B,)``.
            counted: Rows to count, bool ``(B,)``.
            real: Whether they are of real images.

        Raises:
            DataError: If counted features are not finite or of another width, or real ones come
                though they are given; nothing is changed.
        """
        if (real and self.real_rows is not None) or features.shape[1:] != (self.num_features,):
            raise DataError(
                f"expected features of shape (B, {self.num_features}), of generated images alone "
                f"if real rows are given; got shape {tuple(features.shape)}, `real` {real}; change "
                "the metric's settings"
            )
        kept = counted.cpu()
        rows = features.detach().float().cpu()[kept]
        check_finite(rows)
        side = _SIDES[0] if real else _SIDES[1]
        getattr(self, f"{side}_ids").append(sample_ids.cpu()[kept])
        getattr(self, f"{side}_features").append(rows)

    @override
    def compute(self) -> KernelResult:
        """Return the distance, and its deviation over subsets if there are any.

        Raises:
            TooFewImagesError: If a side has too few.
            DataError: If an id stands for two images.
        """
        generated = self._sorted_rows("generated")
        real = self._sorted_rows("real") if self.real_rows is None else self.real_rows
        least = max(self.subset_size if self.num_subsets else 0, 2)
        if min(len(real), len(generated)) < least:
            raise TooFewImagesError(
                f"expected at least {least} images on each side of a kernel distance; got "
                f"{len(real)} real and {len(generated)} generated ones; add images, or lower "
                "`subset_size`"
            )
        mean, std = self.computed_once(lambda: self._distance(real, generated), count=2)
        result = KernelResult(
            distance=mean,
            num_real=torch.tensor(len(real)),
            num_generated=torch.tensor(len(generated)),
        )
        if self.num_subsets:
            result["std"] = std
        return result

    def _distance(self, real: Tensor, generated: Tensor) -> Tensor:
        """Return mean and standard deviation over subsets, or over all images and NaN."""
        if not self.num_subsets:
            whole = squared_distance(real, generated, self.kernel, self.estimator)
            return torch.stack([whole, torch.full_like(whole, torch.nan)])
        distances = torch.stack(
            [
                squared_distance(
                    real[self._drawn(number, "real", len(real))],
                    generated[self._drawn(number, "generated", len(generated))],
                    self.kernel,
                    self.estimator,
                )
                for number in range(self.num_subsets)
            ]
        )
        return torch.stack([distances.mean(), distances.std(correction=0)])

    def _drawn(self, number: int, side: str, count: int) -> Tensor:
        """Draw a subset of ``count`` rows, without replacement, from integers alone."""
        seed = counter_seed(f"kernel distance subset {side}", self.seed, number)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order[: self.subset_size]

    def _sorted_rows(self, side: str) -> Tensor:
        """Return the features of a side in the order of ids, float32 ``(N, d)``.

        Raises:
            DataError: If an id stands for two images.
        """
        ids, rows = (getattr(self, f"{side}_{state}") for state in ("ids", "features"))
        if not sum(part.numel() for part in ids):
            return torch.zeros(0, self.num_features)
        ids, order = torch.sort(dim_zero_cat(ids), stable=True)
        rows = dim_zero_cat(rows)[order]
        is_again = torch.cat([torch.tensor([False]), ids[1:] == ids[:-1]])
        clashes = is_again[1:] & (rows[1:] != rows[:-1]).any(dim=1)
        if clashes.any():
            raise DataError(
                "expected sample ids that tell images apart; "
                f"{int(ids[1:][clashes][0])} stands for two; evaluate one set of images at a time"
            )
        return rows[~is_again]
