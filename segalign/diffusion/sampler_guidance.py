"""The guidance that every sampler has among its settings."""

from dataclasses import dataclass

from segalign.diffusion.guidance import Guidance, IntervalUnit


@dataclass(frozen=True, kw_only=True)
class SamplerGuidance:
    """Base of samplers: how their steps are guided, with flat names for configs.

    Args:
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        guidance_interval: Lowest and highest timestep that is guided; null guides all.
        guidance_interval_unit: ``timestep`` counts training timesteps; ``fraction`` is of the last.
        guidance_rescale: Share in [0, 1] of the guided output that is scaled back to the deviation
            of the conditional one.

    Raises:
        ConfigError: If the settings are out of range, or contradict each other.
    """

    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_interval_unit: IntervalUnit = "timestep"
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        _ = self.guidance

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance of the steps."""
        return Guidance(
            scale=self.guidance_scale,
            interval=self.guidance_interval,
            interval_unit=self.guidance_interval_unit,
            rescale=self.guidance_rescale,
        )
