"""The common direction as the batches of training show it: of each batch, or of their average.

Both sum over all ranks wherever they look at a batch, so that all ranks must call them equally
often, also on a last, smaller batch and for logs. Of captions that do not count, such as those that
could not be read, they see nothing; a rank where none counts asks the others all the same.

Dims: B batch, E joint-embedding width.
"""

import logging
from collections.abc import Callable
from typing import Any, Final, Self

import torch
from torch import Tensor, distributed, nn
from typing_extensions import override

from segalign.errors import ConfigError
from segalign.ranks import is_distributed
from segalign.rewards.decomposition import unit_mean

MIN_BATCH: Final = 64
ESTIMATE_COMMAND: Final = "python main.py direction estimate"
_logger = logging.getLogger(__name__)


class KeepsPrecision(nn.Module):
    """A module whose tensors move with a reward but are not cast with it."""

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: _move(tensor, fn), recurse)  # type: ignore[no-untyped-call]
        return self


def _move(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a move or a cast, and keep the type."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class BatchDirection(nn.Module):
    """The direction of the current batch of all ranks, as the official code estimates it.

    Of a single caption that counts, V is its own direction, and only the score is rescaled.

    Args:
        refuse_single: Refuse a batch of one row over all ranks, of which nothing else can come.
            Estimates that a config names do. Larger batches pass, however few captions count.
    """

    def __init__(self, *, refuse_single: bool = False) -> None:
        super().__init__()
        self.refuse_single = refuse_single
        self._warned = False

    def forward(self, text_features: Tensor, counted: Tensor | None = None) -> Tensor:
        """Estimate V from the batch; all ranks must call it. Warns once below 64 captions.

        Args:
            text_features: ``(B, E)``.
            counted: Which of them count, bool ``(B,)``; None is all.

        Returns:
            V ``(E,)``; any unit vector if no caption counts on any rank.

        Raises:
            ConfigError: If the batch is one row, where that is refused.
        """
        total, count, num_rows = sum_over_ranks(text_features, counted)
        if self.refuse_single:
            check_not_single(num_rows)
        if num_rows < MIN_BATCH and not self._warned:
            self._warned = True
            _logger.warning(
                "the common direction is estimated from %d captions; the text-relevant part of "
                "each is weakened by up to 1/%d; use a direction of a corpus, made with `%s`",
                num_rows,
                num_rows,
                ESTIMATE_COMMAND,
            )
        return _direction(total, count).to(text_features)

    def observe(self, text_features: Tensor) -> Tensor:
        """Return V as a call does: there is nothing to learn."""
        direction: Tensor = self(text_features)
        return direction


class EmaDirection(KeepsPrecision):
    """The direction of a moving average of batch means; it learns in training mode only.

    Args:
        decay: Decay of the average per batch, in [0, 1).
    """

    mean: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        check_decay(decay)
        self.decay = decay
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float64))

    def forward(self, text_features: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return V; in training mode move the average to the batch's mean first.

        All ranks must call it. Where no caption counts on any rank, the average stays as it is.

        Args:
            text_features: ``(B, E)``.
            counted: Which of them count, bool ``(B,)``; None is all.

        Returns:
            V ``(E,)``; any unit vector if no caption has counted so far.
        """
        if self.training:
            total, count, _ = sum_over_ranks(text_features, counted)
            if count:
                mean = total / count
                known = self.mean.to(mean.device)
                self.mean = torch.lerp(mean, known, self.decay) if len(known) else mean
        return self.observe(text_features, counted)

    def observe(self, text_features: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return V and leave the average as it is, in any mode.

        Before there is an average, V is the batch's own, and all ranks must call it.
        """
        if len(self.mean):
            return _direction(self.mean, 1).to(text_features)
        total, count, _ = sum_over_ranks(text_features, counted)
        return _direction(total, count).to(text_features)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Take a saved average, whose width is known only once there is one."""
        if (saved := state_dict.get(f"{prefix}mean")) is not None:
            self.mean = self.mean.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_decay(decay: float) -> None:
    """Refuse a decay outside [0, 1).

    Raises:
        ConfigError: If it is.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"expected `decay` in [0, 1); got {decay}; try 0.99")


def check_not_single(num_captions: int) -> None:
    """Refuse an estimate of V from one caption.

    Args:
        num_captions: Captions of a global batch, whether they count or not: what a config can
            change.

    Raises:
        ConfigError: If it is 1: the text-relevant part would be weakened as much as the other.
    """
    if num_captions < 2:
        raise ConfigError(
            "expected at least 2 captions in a global batch for the `batch` estimate of the common "
            f"direction; got {num_captions}, of which it would only rescale the score; raise "
            f"`global_batch_size`, or use a direction of a corpus, made with `{ESTIMATE_COMMAND}`"
        )


def sum_over_ranks(text_features: Tensor, counted: Tensor | None = None) -> tuple[Tensor, int, int]:
    """Sum features over the batch and all ranks, in float64.

    Args:
        text_features: ``(B, E)``.
        counted: Which of them are summed, bool ``(B,)``; None is all. Those that are not finite
            never are: an average would keep them for good.

    Returns:
        The sum ``(E,)``, without gradient, the number of features in it, and the number of rows,
        whether they count or not.
    """
    num_rows = len(text_features)
    features = text_features.detach().double()
    is_summed = features.isfinite().all(dim=1)
    if counted is not None:
        is_summed &= counted.to(features.device)
    features = features[is_summed]
    sizes = features.new_tensor([float(len(features)), float(num_rows)])
    total = torch.cat([features.sum(dim=0), sizes])
    if is_distributed():
        distributed.all_reduce(total)
    count, num_rows = (int(size) for size in total[-2:].tolist())
    return total[:-2], count, num_rows


def _direction(total: Tensor, count: int) -> Tensor:
    """Normalise a sum; of nothing, return any unit vector: nothing is trained on it."""
    if count:
        return unit_mean(total, count)
    anywhere = torch.zeros_like(total)
    anywhere[0] = 1.0
    return anywhere
