"""Which timesteps the steps of a sampler are taken at."""

from typing import Literal, get_args

from segalign.errors import ConfigError

Spacing = Literal["trailing", "leading", "linspace", "official"]


def check_spacing(num_inference_steps: int, spacing: str) -> None:
    """Check the two settings of every sampler.

    Raises:
        ConfigError: If there is no step, or the spacing is not known.
    """
    if num_inference_steps < 1:
        raise ConfigError(
            f"`num_inference_steps` must be at least 1; got {num_inference_steps}. Raise it."
        )
    if spacing not in get_args(Spacing):
        known = ", ".join(f"`{option}`" for option in get_args(Spacing))
        raise ConfigError(f"`spacing` must be one of {known}; got {spacing!r}. Choose one.")


def spaced_timesteps(spacing: Spacing, num_inference_steps: int, num_timesteps: int) -> list[int]:
    """Choose the noise indices, noisiest first.

    Args:
        spacing: With T training timesteps and N steps: ``trailing`` counts down from T - 1 in
            steps of T / N, rounded; ``leading`` counts up from 1 in steps of T // N, as
            Stable Diffusion's schedulers do; ``linspace`` divides [0, T - 1] evenly, both ends
            included; ``official`` ends at T // N - 1 and counts up in steps of T // N: the official
            LongAlign code, 999, 979, ..., 19 for 50 of 1000, where ``trailing`` is the same.
        num_inference_steps: Steps N.
        num_timesteps: Training timesteps T.

    Raises:
        ConfigError: If there are fewer training timesteps than steps.
    """
    steps, last = num_inference_steps, num_timesteps - 1
    if steps > num_timesteps:
        raise ConfigError(
            f"`num_inference_steps` must be <= {num_timesteps}; got {steps}. Lower it."
        )
    stride = num_timesteps // steps
    if spacing == "trailing":
        return [round(num_timesteps * (1 - i / steps)) - 1 for i in range(steps)]
    if spacing == "leading":
        return [min(i * stride + 1, last) for i in reversed(range(steps))]
    if spacing == "official":
        return [(i + 1) * stride - 1 for i in reversed(range(steps))]
    # A single step must start at the noisiest end.
    return [round(last * i / (steps - 1)) for i in reversed(range(steps))] if steps > 1 else [last]
