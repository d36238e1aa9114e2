"""The loss of clean latents that reward fine-tuning minimises: decode, score, turn the sign.

Dims: B rows of the batch, M rows of a call, c/h/w latents, H/W pixels.

Reference: arXiv 2410.11817 (minus the reward), arXiv 2304.05977 (ReFL, hinge).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_later

from segalign.errors import ConfigError
from segalign.rewards.bound_reward import BoundReward, RewardTerms

Saturated = Literal["zero", "pass"]


@dataclass(frozen=True, kw_only=True)
class RewardObjective:
    """What is minimised: minus the reward, or how far it stays below a bound.

    Args:
        scale: Factor of the loss, above 0.
        hinge: Images whose reward is above it are left alone: the loss is
            ``scale * max(hinge - R, 0)``, as in ReFL. None is ``-scale * R``.

    Raises:
        ConfigError: If the scale is not above 0, or a number is not finite.
    """

    scale: float = 1.0
    hinge: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(
                f"expected a `scale` of the reward above 0; got {self.scale}; "
                "give a mixture's part a negative weight to punish"
            )
        if self.hinge is not None and not math.isfinite(self.hinge):
            raise ConfigError(
                f"expected a finite `hinge` of the reward; got {self.hinge}; null is none"
            )

    def losses(self, rewards: Tensor) -> Tensor:
        """Return the loss of each reward, ``(M,)``; carries gradient."""
        if self.hinge is None:
            return -self.scale * rewards
        return self.scale * F.relu(self.hinge - rewards)


class LatentRewardLoss:
    """Losses of clean latents by a bound reward: a ``LossOfLatents`` of the engines.

    It remembers, on the device and without gradient, the rewards and parts of all its calls, so
    that a step makes one of its own. The first call that has a row is of its image; later ones are
    of re-noised copies of that.

    Args:
        decode: Maps latents ``(M, c, h, w)`` to images ``(M, 3, H, W)``, nominally in [0, 1].
            Carries gradient, and is the same when called again.
        bound: The reward, bound to the captions of the rows: see ``bind_reward``. It sees images of
            float32 at least, in [0, 1].
        objective: Turns rewards into losses.
        weights: Factor of each row's loss, ``(B,)``. Rows of weight 0 are decoded from zeros:
            whatever they hold, their loss and its gradient are 0, and nothing is remembered of
            them.
        checkpoint: Keep the latents alone of a call of ``decode``, and decode once more in the
            backward pass.
        saturated: Gradient of pixels outside [0, 1], which are clamped: ``zero``, as clamping has
            it and the official code, or ``pass``, as if they were not clamped.
    """

    def __init__(
        self,
        *,
        decode: Callable[[Tensor], Tensor],
        bound: BoundReward,
        objective: RewardObjective,
        weights: Tensor,
        checkpoint: bool = False,
        saturated: Saturated = "zero",
    ) -> None:
        self._decode = decode
        self._bound = bound
        self._objective = objective
        self._weights = weights
        self._checkpoint = checkpoint
        self._saturated = saturated
        self._of_images, self._of_copies = _Tally(weights), _Tally(weights)
        self._num_undecodable = torch.zeros_like(weights, dtype=torch.float32)

    def __call__(self, latents: Tensor, rows: Tensor) -> Tensor:
        """Decode and score.

        Args:
            latents: Clean latents ``(M, c, h, w)``. Carries gradient.
            rows: Which row of the batch each is, int64 ``(M,)``.

        Returns:
            Losses ``(M,)``.

        Raises:
            ConfigError: If decoder or reward give no gradient, or not one value for each image.
        """
        weights = self._weights[rows]
        counts = weights != 0
        images, finite = self._images(torch.where(counts[:, None, None, None], latents, 0.0))
        if torch.is_grad_enabled() and latents.requires_grad and not images.requires_grad:
            raise ConfigError(
                "expected a decoder with a gradient to the latents; got images that carry none; "
                "decode without `torch.no_grad`"
            )
        terms = self._bound(images, rows)
        self._remember(rows, counts, finite, terms)
        losses = self._objective.losses(terms.rewards)
        return torch.where(counts, weights.to(losses) * losses, 0.0)

    def collected(self) -> dict[str, Tensor]:
        """Return what was found of the images so far: ``rewards``, and each part by its name.

        Returns:
            ``(B,)`` each, without gradient; NaN where there was no call for the row, or the weight
            is 0.
        """
        return self._of_images.means()

    def renoised(self) -> Tensor:
        """Return the rewards of the re-noised copies so far.

        Returns:
            ``(B,)``, without gradient: the mean over a row's copies; NaN where there was none, or
            the weight is 0.
        """
        return self._of_copies.means()["rewards"]

    def name_non_finite(self) -> str | None:
        """Say what was not finite, and for which rows; waits for the device.

        Returns:
            "`NAME` for rows [...]", several joined by semicolons: images where decoding failed, and
            otherwise rewards, of a mixture the parts; None if all was finite.
        """
        undecodable = self._num_undecodable > 0
        copies = self._of_copies.non_finite()
        bad = {
            name: (rows | copies.get(name, False)) & ~undecodable
            for name, rows in self._of_images.non_finite().items()
        }
        found = {name: rows for name, rows in bad.items() if rows.any()}
        # What is made of others is left out where those are named.
        if len(found) > 1:
            found.pop("rewards", None)
        named = [
            f"`{n}` for rows {_listed(r)}" for n, r in found.items() if _parent(n) not in found
        ]
        if undecodable.any():
            named.insert(0, f"the decoded images for rows {_listed(undecodable)}")
        return "; ".join(named) or None

    def _images(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Decode to images in [0, 1], and tell which are finite, ``(M,)``."""
        if not self._checkpoint:
            return self._decode_clamped(latents)
        decoded: tuple[Tensor, Tensor] = recompute_later(
            self._decode_clamped, latents, use_reentrant=False
        )
        return decoded

    def _decode_clamped(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        images = self._decode(latents)
        finite = images.detach().isfinite().flatten(1).all(dim=1)
        if images.dtype != torch.float64:
            images = images.float()
        clamped = images.clamp(0, 1)
        if self._saturated == "pass":
            # The second term is 0, with the gradient of the images.
            clamped = clamped.detach() + (images - images.detach())
        return clamped, finite

    @torch.no_grad()
    def _remember(self, rows: Tensor, counts: Tensor, finite: Tensor, terms: RewardTerms) -> None:
        """Add what a call found to what is known of its rows, on the device."""
        self._num_undecodable.index_add_(0, rows, (~finite).to(self._num_undecodable))
        is_copy = self._of_images.num_calls[rows] > 0
        for tally, are_its in ((self._of_images, ~is_copy), (self._of_copies, is_copy)):
            tally.add(rows, counts & are_its, {"rewards": terms.rewards, **terms.parts})


class _Tally:
    """Sums of values by row, on the device.

    Attributes:
        num_calls: How often each row was counted, float32 ``(B,)``.
    """

    def __init__(self, weights: Tensor) -> None:
        self.num_calls = torch.zeros_like(weights, dtype=torch.float32)
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Tensor, counts: Tensor, found: Mapping[str, Tensor]) -> None:
        """Add values ``(M,)`` by name to rows, int64 ``(M,)``, where they count, bool ``(M,)``."""
        self.num_calls.index_add_(0, rows, counts.to(self.num_calls))
        for name, values in found.items():
            if values.dtype != torch.float64:
                values = values.float()
            if name not in self._sums:
                self._sums[name] = values.new_zeros(len(self.num_calls))
            self._sums[name].index_add_(0, rows, torch.where(counts, values, 0.0))

    def means(self) -> dict[str, Tensor]:
        """Return means by name, ``rewards`` among them, ``(B,)``; NaN where nothing counted."""
        never = torch.full_like(self.num_calls, torch.nan)
        return {"rewards": never} | {n: total / self.num_calls for n, total in self._sums.items()}

    def non_finite(self) -> dict[str, Tensor]:
        """Tell by name which rows have a value that is not finite, bool ``(B,)``."""
        return {name: ~total.isfinite() for name, total in self._sums.items()}


def _parent(name: str) -> str:
    """Return the name of the reward that a part belongs to, or nothing."""
    return name.rpartition("/")[0]


def _listed(rows: Tensor) -> list[int]:
    numbers: list[int] = rows.nonzero().flatten().tolist()
    return numbers
