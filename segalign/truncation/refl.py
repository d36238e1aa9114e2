"""ReFL: one late step, its clean latents predicted in one step."""

from dataclasses import dataclass

from segalign.errors import ConfigError
from segalign.truncation.plan import TruncationPlan, check_at_least, check_below, draw_integer


@dataclass(frozen=True, kw_only=True)
class ReFL:
    """ReFL (arXiv 2304.05977): one random late step.

    | trained steps | input detached | image scored |
    |---|---|---|
    | one, uniform over a range (30..39 of N = 40) | yes (earlier steps untrained) | one-step \
clean latents there |

    Its loss is a hinge on the reward, and it uses no guidance; both are settings elsewhere.

    Args:
        first_step: First step of the range, at least 0.
        last_step: Last step of the range, included; below N.
        normalize: Divide the gradient by ``|c_t|``.

    Raises:
        ConfigError: If the range is empty or negative.
    """

    first_step: int = 30
    last_step: int = 39
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        check_at_least("first_step", self.first_step, 0)
        if self.last_step < self.first_step:
            raise ConfigError(
                f"`last_step` must be >= `first_step` ({self.first_step}); got {self.last_step}, "
                "which trains no step. Raise it."
            )

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Draw the step: see ``TruncationStrategy``."""
        check_below("last_step", self.last_step, num_steps)
        drawn = draw_integer("refl", seed, step, self.first_step, self.last_step)
        return TruncationPlan(
            num_steps=num_steps,
            train_steps=(drawn,),
            last_step=drawn,
            detach_input=True,
            normalize=self.normalize,
        )
