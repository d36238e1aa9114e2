"""DRTune and LongAlign: some steps, equally spaced, with detached inputs."""

from dataclasses import dataclass

from segalign.truncation.plan import (
    TruncationPlan,
    check_at_least,
    check_below,
    draw_integer,
)


@dataclass(frozen=True, kw_only=True)
class DRTune:
    """DRTune (arXiv 2405.00760): K equally spaced steps with a random offset.

    | trained steps | input detached | image scored |
    |---|---|---|
    | K, every floor(N/K)-th from a random first one | yes | one-step clean latents, t-th from the \
end, t uniform over 1..m (m = 0: final) |

    The first step is uniform over 0..N-1-(K-1) floor(N/K), so that every step can be trained also
    when K does not divide N. With an early stop, steps after it do not run and are not trained; an
    offset that would leave none is drawn again.

    Args:
        num_train_steps: K, 1..N; 2 to 5 in use.
        early_stop: m, 0..N-1; about 0.4 N in use. 0 scores the final image.
        normalize: Divide the gradient by the sum of ``|c_t|``, which depends on the offset
            (2.5-fold for K = 5, N = 50).

    Raises:
        ConfigError: If a number is out of its range.
    """

    num_train_steps: int = 5
    early_stop: int = 0
    normalize: bool = False

    def __post_init__(self) -> None:
        """Check the ranges that do not depend on N."""
        check_at_least("num_train_steps", self.num_train_steps, 1)
        check_at_least("early_stop", self.early_stop, 0)

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Draw the offset and the early stop: see ``TruncationStrategy``."""
        check_below("num_train_steps", self.num_train_steps, num_steps, inclusive=True)
        check_below("early_stop", self.early_stop, num_steps)
        last_step = num_steps - 1
        if self.early_stop:
            last_step = num_steps - draw_integer("early_stop", seed, step, 1, self.early_stop)
        stride = num_steps // self.num_train_steps
        last_offset = num_steps - 1 - (self.num_train_steps - 1) * stride
        offset = draw_integer("offset", seed, step, 0, min(last_offset, last_step))
        steps = (offset + i * stride for i in range(self.num_train_steps))
        return TruncationPlan(
            num_steps=num_steps,
            train_steps=tuple(index for index in steps if index <= last_step),
            last_step=last_step,
            detach_input=True,
            normalize=self.normalize,
        )


@dataclass(frozen=True, kw_only=True)
class LongAlign:
    """LongAlign (arXiv 2410.11817): DRTune with K = 5 and no early stop; N = 50 in the paper.

    | trained steps | input detached | image scored |
    |---|---|---|
    | 5, every floor(N/5)-th from a random first one | yes | final |

    Args:
        normalize: Divide the gradient by the sum of ``|c_t|``, which depends on the offset.
    """

    normalize: bool = False

    def plan(self, num_steps: int, seed: int, step: int) -> TruncationPlan:
        """Draw the offset: see ``TruncationStrategy``."""
        return DRTune(num_train_steps=5, normalize=self.normalize).plan(num_steps, seed, step)
