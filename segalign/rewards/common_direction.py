"""The common direction of a model's text features, estimated in three ways.

A direction from many captions (`CorpusDirection`) is the default: a batch's own estimate holds the
captions that it is used on, so that of a sample's text-relevant part only ``1 - (1 - omega) / B``
survives, and of a single caption's nothing but the factor omega.

Dims: B batch, E joint-embedding width, R ranks.

Reference: arXiv 2410.11817; the official code estimates from the batch of all ranks.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from segalign.atomic import write_bytes_atomic
from segalign.errors import ConfigError, DataError
from segalign.rewards.batch_directions import ESTIMATE_COMMAND as ESTIMATE_COMMAND
from segalign.rewards.batch_directions import MIN_BATCH as MIN_BATCH
from segalign.rewards.batch_directions import BatchDirection as BatchDirection
from segalign.rewards.batch_directions import EmaDirection as EmaDirection
from segalign.rewards.batch_directions import KeepsPrecision
from segalign.rewards.batch_directions import check_decay as check_decay
from segalign.rewards.batch_directions import sum_over_ranks as sum_over_ranks
from segalign.rewards.decomposition import common_share, unit_mean
from segalign.rewards.protocol import takes_counted

MIN_CORPUS = 512
# float32 keeps the length of a vector of 2**12 numbers much better.
_UNIT_TOLERANCE = 1e-3
_KEY = "common_direction"


class CommonDirection(Protocol):
    """An estimate of the common direction V.

    One that learns from calls has a method ``observe``, which takes and returns the same and learns
    nothing: see `observe_direction`. One that follows the batches may take ``counted``: see
    `ask_direction`.
    """

    def __call__(self, text_features: Tensor) -> Tensor:
        """Return V for a batch.

        Args:
            text_features: The batch's features, ``(B, E)``, which an estimator may learn from; on a
                rank there may be none.

        Returns:
            Unit vector ``(E,)``, without gradient.
        """
        ...


def ask_direction(
    estimate: CommonDirection, text_features: Tensor, counted: Tensor | None = None
) -> Tensor:
    """Ask an estimate for a batch's V, with those captions alone that count.

    Args:
        estimate: The estimate. If it takes an argument ``counted``, it is given both; if not, the
            features that count.
        text_features: See ``CommonDirection``.
        counted: Which count, bool ``(B,)``; None is all.
    """
    if counted is None:
        return estimate(text_features)
    counted = counted.to(text_features.device)
    if takes_counted(estimate):
        asked: Any = estimate
        direction: Tensor = asked(text_features, counted=counted)
        return direction
    return estimate(text_features[counted])


def observe_direction(estimate: CommonDirection, text_features: Tensor) -> Tensor:
    """Return an estimate's V for a batch, for logs and reports; it learns nothing.

    Those that follow the batches may sum over ranks, so that all ranks must call this.

    Args:
        estimate: The estimate.
        text_features: See ``CommonDirection``.
    """
    observe: CommonDirection = getattr(estimate, "observe", estimate)
    return observe(text_features)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a saved direction comes from.

    Attributes:
        model: Name of the model, for people.
        model_digest: Digest of its text weights and their projection.
        text: How captions became features: see ``describe_text``.
        captions_digest: Digest of the captions, in order.
        num_captions: Their number.
    """

    model: str
    model_digest: str
    text: str
    captions_digest: str
    num_captions: int


class CorpusMean:
    """Mean of any number of text features, in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | None = None

    def update(self, text_features: Tensor) -> None:
        """Add features ``(B, E)``."""
        total = text_features.detach().double().cpu().sum(dim=0)
        self._total = total if self._total is None else self._total + total
        self.count += len(text_features)

    @property
    def norm(self) -> float:
        """Length of the mean, which is the mean common share; 0 without captions."""
        return 0.0 if self._total is None else (self._total / self.count).norm().item()

    def direction(self) -> Tensor:
        """Return V, float64 ``(E,)``.

        Raises:
            DataError: If there are too few captions, or they share no direction.
        """
        if self._total is None or self.count < MIN_CORPUS:
            raise DataError(
                f"expected at least {MIN_CORPUS} captions for a common direction; got "
                f"{self.count}; add captions"
            )
        return unit_mean(self._total, self.count)


class CorpusDirection(KeepsPrecision):
    """A direction that was estimated once, from many captions.

    Args:
        direction: V, unit vector ``(E,)``; kept in float32 when a reward is cast.
        provenance: Where it comes from.
    """

    direction: Tensor

    def __init__(self, direction: Tensor, provenance: Provenance) -> None:
        super().__init__()
        self.register_buffer("direction", direction.detach().float(), persistent=False)
        self.provenance = provenance

    def forward(self, text_features: Tensor) -> Tensor:
        """Return V; it learns nothing from the batch.

        Raises:
            DataError: If the features have another width.
        """
        if text_features.shape[-1] != len(self.direction):
            raise DataError(
                f"expected a common direction of width {text_features.shape[-1]}, the model's; "
                f"got {len(self.direction)}, estimated with {self.provenance.model}; estimate one "
                f"for this model with `{ESTIMATE_COMMAND}`"
            )
        return self.direction.to(text_features)

    def check_model(self, model_digest: str) -> None:
        """Refuse a direction of another model.

        Raises:
            DataError: If it was estimated with other text weights.
        """
        if model_digest != self.provenance.model_digest:
            raise DataError(
                f"expected a common direction of this model's text weights ({model_digest[:12]}); "
                f"got one of {self.provenance.model} ({self.provenance.model_digest[:12]}); "
                f"estimate one for this model with `{ESTIMATE_COMMAND}`"
            )

    def save(self, path: Path) -> None:
        """Write direction and provenance as one safetensors file, whole or not at all."""
        facts = {name: str(value) for name, value in asdict(self.provenance).items()}
        write_bytes_atomic(path, save({_KEY: self.direction.cpu()}, metadata=facts))

    @classmethod
    def load(cls, path: Path) -> "CorpusDirection":
        """Read a direction.

        Raises:
            ConfigError: If there is no such file.
            DataError: If it holds no direction.
        """
        if not path.is_file():
            raise ConfigError(
                f"expected a common direction at `{path}`; there is no such file; make it with "
                f"`{ESTIMATE_COMMAND}`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                facts = dict(file.metadata() or {})
                direction = file.get_tensor(_KEY)
            facts["num_captions"] = int(facts["num_captions"])
            _check_unit(direction)
            return cls(direction, Provenance(**facts))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"expected a common direction in `{path}`; got: {error}; estimate it again"
            ) from error


@dataclass(frozen=True)
class ShareStatistics:
    """How narrow a cone is: statistics of common shares.

    Attributes:
        mean: Mean share.
        std: Standard deviation.
        low: 5 % quantile.
        high: 95 % quantile.
    """

    mean: float
    std: float
    low: float
    high: float


def share_statistics(
    batches: Iterable[Tensor], common_direction: Tensor
) -> tuple[ShareStatistics, Tensor]:
    """Compute statistics of the common shares of any number of features.

    Args:
        batches: Features ``(B, E)``, batch by batch.
        common_direction: V, ``(E,)``.

    Returns:
        The statistics, and all shares, float64 on the CPU: 8 bytes for each feature.
    """
    direction = common_direction.double()
    shares = torch.cat([common_share(batch.double(), direction).cpu() for batch in batches])
    # NumPy's quantile, because PyTorch's takes no more than 2**24 numbers.
    low, high = np.quantile(shares.numpy(), [0.05, 0.95]).tolist()
    return ShareStatistics(shares.mean().item(), shares.std().item(), low, high), shares


def _check_unit(direction: Tensor) -> None:
    """Refuse what is no unit vector.

    Raises:
        ValueError: If it is not.
    """
    norm = direction.norm().item()
    if direction.ndim != 1 or not abs(norm - 1) < _UNIT_TOLERANCE:
        raise ValueError(f"no unit vector, but shape {tuple(direction.shape)} of length {norm:.4g}")
