"""DRaFT: the last steps, or all of them, back-propagated through."""

from dataclasses import dataclass
from typing import get_args

from segalign.errors import ConfigError
from segalign.truncation.plan import Reduction, TruncationPlan, check_at_least, check_below


@dataclass(frozen=True, kw_only=True)
class DRaFT:
    """DRaFT-K (arXiv 2309.17400): the last K steps.

    | trained steps | input detached | image scored |
    |---|---|---|
    | the last K | no (the chain starts at N-K) | final |

    Args:
        num_train_steps: K, 1..N; 1 is typical, and has no earlier step that its input could lead
            to, so that it can be replayed.
        normalize: Divide the gradient by the sum of ``|c_t|``.

    Raises:
        ConfigError: If K is below 1.
    """

    num_train_steps: int = 1
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check the range that does not depend on N."""
        check_at_least("num_train_steps", self.num_train_steps, 1)

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Take the last steps; nothing is drawn: see ``TruncationStrategy``."""
        check_below("num_train_steps", self.num_train_steps, num_steps, inclusive=True)
        return TruncationPlan(
            num_steps=num_steps,
            train_steps=tuple(range(num_steps - self.num_train_steps, num_steps)),
            last_step=num_steps - 1,
            detach_input=False,
            normalize=self.normalize,
        )


@dataclass(frozen=True, kw_only=True)
class DRaFTLV:
    """DRaFT-LV (arXiv 2309.17400): the last step, on several noised copies of the image.

    | trained steps | input detached | image scored |
    |---|---|---|
    | the last | not applicable | final, and n copies noised to the last level and denoised \
by it |

    Args:
        num_renoised: n, at least 0; 2 in the paper. 0 is DRaFT-1.
        reduction: Whether the n + 1 gradients are summed or averaged.
        normalize: Divide the gradient by ``|c_t|`` of the last step.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    num_renoised: int = 2
    reduction: Reduction = "sum"
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        check_at_least("num_renoised", self.num_renoised, 0)
        if self.reduction not in get_args(Reduction):
            raise ConfigError(
                f"`reduction` must be one of `sum`, `mean`; got {self.reduction!r}. Choose one."
            )

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Take the last step; nothing is drawn: see ``TruncationStrategy``."""
        check_at_least("num_inference_steps", num_steps, 1)
        return TruncationPlan(
            num_steps=num_steps,
            train_steps=(num_steps - 1,),
            last_step=num_steps - 1,
            detach_input=False,
            num_renoised=self.num_renoised,
            reduction=self.reduction,
            normalize=self.normalize,
        )


@dataclass(frozen=True, kw_only=True)
class FullBackpropagation:
    """Back-propagation through all steps.

    | trained steps | input detached | image scored |
    |---|---|---|
    | all | no | final |

    Args:
        normalize: Divide the gradient by the sum of ``|c_t|``.
    """

    normalize: bool = False

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Take all steps; nothing is drawn: see ``TruncationStrategy``."""
        check_at_least("num_inference_steps", num_steps, 1)
        strategy = DRaFT(num_train_steps=num_steps, normalize=self.normalize)
        return strategy.plan(num_steps, seed, step)
