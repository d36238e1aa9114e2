"""AlignProp: all steps from a random one on, back-propagated through."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

from segalign.errors import ConfigError
from segalign.truncation.plan import (
    TruncationPlan,
    check_at_least,
    check_below,
    draw_integer,
    draw_weighted,
)

Start = Literal["gaussian", "uniform", "fixed"]


@dataclass(frozen=True, kw_only=True)
class AlignProp:
    """AlignProp (arXiv 2310.03739): all steps from a random one on.

    | trained steps | input detached | image scored |
    |---|---|---|
    | all i >= r | no | final |

    Args:
        start: How r is drawn: ``gaussian`` is the official floor of N(42, 5) for 50 steps, drawn
            again until it lies in 1..49, and scaled to N steps; ``uniform`` is over 1..N-1;
            ``fixed`` is ``first_step``.
        first_step: r of ``fixed``, 0..N-1; None is N-1.
        normalize: Divide the gradient by the sum of ``|c_t|``.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    start: Start = "gaussian"
    first_step: int | None = None
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.start not in get_args(Start):
            known = ", ".join(f"`{option}`" for option in get_args(Start))
            raise ConfigError(f"`start` must be one of {known}; got {self.start!r}. Choose one.")
        if self.first_step is not None:
            check_at_least("first_step", self.first_step, 0)
            if self.start != "fixed":
                raise ConfigError(
                    f"`first_step` is for `start: fixed`; got `start: {self.start}`. "
                    "Remove one of them."
                )

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Draw the first trained step: see ``TruncationStrategy``."""
        check_at_least("num_inference_steps", num_steps, 1)
        return TruncationPlan(
            num_steps=num_steps,
            train_steps=tuple(range(self._first(num_steps, seed, step), num_steps)),
            last_step=num_steps - 1,
            detach_input=False,
            normalize=self.normalize,
        )

    def _first(self, num_steps: int, seed: int, step: int) -> int:
        """Draw r; a sampler of one step has no choice."""
        if self.start == "fixed":
            first = num_steps - 1 if self.first_step is None else self.first_step
            check_below("first_step", first, num_steps)
            return first
        if num_steps == 1:
            return 0
        if self.start == "uniform":
            return draw_integer("first_step", seed, step, 1, num_steps - 1)
        return 1 + draw_weighted("first_step", seed, step, gaussian_weights(num_steps))


def gaussian_weights(num_steps: int) -> list[float]:
    """Return the weights of r = 1..N-1: the normal mass of [r, r + 1), not normalised.

    Mean and standard deviation are those of 50 steps, 42 and 5, times N / 50.
    """
    mean, deviation = 0.84 * num_steps, 0.1 * num_steps
    edges = [(edge - mean) / (deviation * math.sqrt(2)) for edge in range(1, num_steps + 1)]
    cumulated = [math.erf(edge) for edge in edges]
    return [above - below for below, above in itertools.pairwise(cumulated)]
