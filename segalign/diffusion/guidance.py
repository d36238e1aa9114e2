"""Classifier-free guidance: its scale, the timesteps it acts at, and rescaling.

Dims: B batch, c/h/w latents.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from segalign.diffusion.linear_steps import Denoiser
from segalign.errors import ConfigError

IntervalUnit = Literal["timestep", "fraction"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a conditional and an unconditional output become one.

    Args:
        scale: Factor w: ``w conditional + (1 - w) unconditional``. 1 is off, and skips the
            unconditional pass.
        interval: Lowest and highest timestep that is guided, both included; at others the
            conditional pass is all there is. None guides all (Kynkaanniemi et al. 2024).
        interval_unit: ``timestep`` counts training timesteps; ``fraction`` is of the last of them,
            0 for the cleanest and 1 for the noisiest.
        rescale: Share phi in [0, 1] of the guided output that is scaled back to the standard
            deviation of the conditional one (arXiv 2305.08891, eq. 15 and 16). Not linear in the
            outputs: for sampling alone, not for exact replay of gradients.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    interval_unit: IntervalUnit = "timestep"
    rescale: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings, alone and together."""
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ConfigError(
                f"guidance `scale` must be at least 0; got {self.scale}. Use 1 for none."
            )
        if not 0 <= self.rescale <= 1:
            raise ConfigError(
                f"guidance `rescale` must be in [0, 1]; got {self.rescale}. Use 0 for none."
            )
        self._check_interval()
        for name, is_set in (("interval", self.interval is not None), ("rescale", self.rescale)):
            if self.scale == 1 and is_set:
                raise ConfigError(
                    f"guidance `{name}` has no effect at `scale` 1; got {getattr(self, name)}. "
                    f"Remove `{name}`, or raise `scale`."
                )

    def is_active(self, timestep: int, num_timesteps: int) -> bool:
        """Tell whether a step needs the unconditional pass.

        Args:
            timestep: Noise index of the step.
            num_timesteps: Number of training timesteps.
        """
        if self.scale == 1 or self.interval is None:
            return self.scale != 1
        last = max(num_timesteps - 1, 1)
        place = timestep if self.interval_unit == "timestep" else timestep / last
        return self.interval[0] <= place <= self.interval[1]

    def weights(self, timestep: int, num_timesteps: int) -> tuple[float, float]:
        """Return the factors of the conditional and the unconditional output: w, 1 - w."""
        if not self.is_active(timestep, num_timesteps):
            return 1.0, 0.0
        return self.scale, 1.0 - self.scale

    def combine(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guide a step at which guidance is active.

        Args:
            conditional: Output with the prompt, ``(B, c, h, w)``; differentiated.
            unconditional: Output without, ``(B, c, h, w)``; differentiated.

        Returns:
            Guided output ``(B, c, h, w)``.
        """
        guided = unconditional + self.scale * (conditional - unconditional)
        if not self.rescale:
            return guided
        ratio = _deviation(conditional) / _deviation(guided)
        return guided * (1 + self.rescale * (ratio - 1))

    def denoiser(
        self, conditional: Denoiser, unconditional: Denoiser, num_timesteps: int
    ) -> Denoiser:
        """Join two network calls; the second is made where guidance is active."""

        def denoise(latents: Tensor, timestep: int) -> Tensor:
            output = conditional(latents, timestep)
            if not self.is_active(timestep, num_timesteps):
                return output
            return self.combine(output, unconditional(latents, timestep))

        return denoise

    def require_linear(self) -> None:
        """Refuse settings under which outputs do not enter linearly.

        Raises:
            ConfigError: If the guided output is rescaled.
        """
        if self.rescale:
            raise ConfigError(
                "expected guidance that is linear in the outputs for exact replay of gradients; "
                f"got `rescale` {self.rescale}. Set it to 0, or use the graph engine."
            )

    def _check_interval(self) -> None:
        if self.interval_unit not in get_args(IntervalUnit):
            known = ", ".join(f"`{unit}`" for unit in get_args(IntervalUnit))
            raise ConfigError(
                f"`interval_unit` must be one of {known}; got {self.interval_unit!r}. Choose one."
            )
        if self.interval is None:
            return
        low, high = self.interval
        highest = 1.0 if self.interval_unit == "fraction" else math.inf
        if not 0 <= low <= high <= highest:
            unit = "0 <= low <= high" + (" <= 1" if self.interval_unit == "fraction" else "")
            raise ConfigError(
                f"guidance `interval` must be (low, high) with {unit}; got ({low}, {high}). "
                "Correct it."
            )


def _deviation(output: Tensor) -> Tensor:
    """Standard deviation of each sample, shaped to broadcast."""
    return output.std(dim=list(range(1, output.ndim)), keepdim=True)
