"""What a truncation strategy decides for one optimizer step.

Steps are counted by their position in the sampler's loop, 0 = noisiest. Dims: N inference steps,
K trained steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from segalign.errors import ConfigError
from segalign.rng import counter_uniform

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class TruncationPlan:
    """Which steps of one rollout are trained, and how.

    The chain carries gradient from the first trained step on; nothing before it depends on weights
    that are differentiated. The image is scored at ``last_step``: the final clean latents if it is
    the sampler's last step, else the clean latents predicted in one step there.

    Attributes:
        num_steps: N, steps of the sampler.
        train_steps: The trained steps, at least one, ascending, none after ``last_step``.
        last_step: The last step that runs.
        detach_input: Whether the network, and the conversion of its output to noise, see latents
            without gradient. If not, the trained steps are all the last ones.
        num_renoised: Copies of the clean latents that are noised again and denoised by the last
            step; each adds the gradient of its own image.
        reduction: How the gradients of the image and its copies are combined.
        normalize: Divide the gradient by the sum of ``|c_t|`` over the trained steps.

    Raises:
        ConfigError: If the steps do not fit.
    """

    num_steps: int
    train_steps: tuple[int, ...]
    last_step: int
    detach_input: bool
    num_renoised: int = 0
    reduction: Reduction = "sum"
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check that the steps fit each other."""
        if not 0 <= self.last_step < self.num_steps:
            raise ConfigError(
                f"expected a last step in 0..{self.num_steps - 1}; got {self.last_step}. "
                "See the truncation strategy."
            )
        steps = self.train_steps
        if not steps or list(steps) != sorted({*steps}) or not 0 <= steps[0] <= steps[-1]:
            raise ConfigError(
                f"expected at least one trained step, ascending; got {steps}. "
                "See the truncation strategy."
            )
        if steps[-1] > self.last_step:
            raise ConfigError(
                f"expected trained steps up to the last one that runs ({self.last_step}); got "
                f"{steps[-1]}. See the truncation strategy."
            )
        if not self.detach_input and steps != tuple(range(steps[0], self.last_step + 1)):
            raise ConfigError(
                "expected all the last steps to be trained where inputs are attached; got "
                f"{steps}. Detach the input."
            )
        if self.num_renoised and steps != (self.num_steps - 1,):
            raise ConfigError(
                f"expected the last step alone to be trained with re-noised copies; got {steps}. "
                "Set `num_renoised` to 0."
            )

    @property
    def replayable(self) -> bool:
        """Whether no trained step's input depends on another's output in the gradient."""
        return self.detach_input or self.train_steps == (self.last_step,)

    @property
    def scores_final(self) -> bool:
        """Whether the sampler runs to its end."""
        return self.last_step == self.num_steps - 1


class TruncationStrategy(Protocol):
    """The settings of a truncation: what a config names."""

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Decide for one optimizer step.

        Args:
            num_steps: N, steps of the sampler, at least 1.
            seed: Seed of the run.
            step: The optimizer step. With the seed it alone decides, so that all samples and ranks
                have the same plan.

        Returns:
            The plan; it trains at least one step.

        Raises:
            ConfigError: If the strategy does not fit this number of steps.
        """
        ...


def draw_integer(purpose: str, seed: int, step: int, first: int, last: int) -> int:
    """Draw from first..last, both included, by the seed and the optimizer step alone."""
    return first + int(counter_uniform(f"truncation.{purpose}", seed, step) * (last - first + 1))


def draw_weighted(purpose: str, seed: int, step: int, weights: Sequence[float]) -> int:
    """Draw a position with a probability in proportion to its weight."""
    left = counter_uniform(f"truncation.{purpose}", seed, step) * sum(weights)
    for position, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return position
    return max(position for position, weight in enumerate(weights) if weight > 0)


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        ConfigError: If it is.
    """
    if value < least:
        raise ConfigError(f"`{name}` must be at least {least}; got {value}. Raise it.")


def check_below(name: str, value: int, num_steps: int, *, inclusive: bool = False) -> None:
    """Refuse a number of steps that the sampler does not have.

    Raises:
        ConfigError: If ``value >= num_steps``, or, with ``inclusive``, ``value > num_steps``.
    """
    if value > num_steps or (value == num_steps and not inclusive):
        relation = "<=" if inclusive else "<"
        raise ConfigError(
            f"`{name}` must be {relation} the number of inference steps ({num_steps}); got "
            f"{value}. Lower it or raise the number of steps."
        )
