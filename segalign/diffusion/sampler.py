"""Samplers of one step each: DDIM and Euler as linear recursions.

Every step is ``x' = a x + b output + noise eps``, with scalars from float64 tables.
Dims: B batch, T inference steps, c/h/w latents.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from segalign.diffusion.linear_path import LinearPath
from segalign.diffusion.linear_steps import Denoiser as Denoiser
from segalign.diffusion.linear_steps import LinearStep as LinearStep
from segalign.diffusion.linear_steps import StepNoise as StepNoise
from segalign.diffusion.linear_steps import ddim_steps, run_steps
from segalign.diffusion.sampler_guidance import SamplerGuidance
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.spacing import Spacing, check_spacing, spaced_timesteps
from segalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LinearSampler(SamplerGuidance):
    """A sampler whose steps are linear recursions, without injected noise.

    Args:
        num_inference_steps: Steps T, at least 1.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        guidance_interval: Lowest and highest timestep that is guided; null guides all.
        guidance_interval_unit: ``timestep`` counts training timesteps; ``fraction`` is of the last.
        guidance_rescale: Share in [0, 1] of the guided output that is scaled back to the deviation
            of the conditional one.
        spacing: Which timesteps the steps are taken at; see `spaced_timesteps`.
    """

    num_inference_steps: int = 25
    spacing: Spacing = "trailing"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_spacing(self.num_inference_steps, self.spacing)

    def timesteps(self, num_timesteps: int) -> list[int]:
        """Choose the noise indices, noisiest first.

        Raises:
            ConfigError: If there are fewer training timesteps than inference steps.
        """
        return spaced_timesteps(self.spacing, self.num_inference_steps, num_timesteps)

    def initial_scale(self, schedule: NoiseSchedule) -> float:
        """Return the standard deviation of the first latents."""
        return 1.0

    def steps(self, schedule: NoiseSchedule) -> list[LinearStep]:
        """Tabulate the recursion; the last step ends at the predicted clean latents."""
        return ddim_steps(schedule, self.timesteps(schedule.num_timesteps), eta=0.0)

    def path(self, schedule: NoiseSchedule) -> LinearPath:
        """Tabulate where each output ends up."""
        return LinearPath.from_steps(self.steps(schedule), self.initial_scale(schedule))

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        step_noise: StepNoise | None = None,
        enable_grad: bool = False,
    ) -> Tensor:
        """Run the recursion.

        Args:
            denoise: Network call ``(latents, timestep) -> output``, guidance included.
            noise: Starting noise, standard normal, ``(B, c, h, w)``.
            schedule: Noise levels and parameterisation.
            step_noise: Standard normal noise to inject: ``(T, B, c, h, w)``, or a function of the
                step index, 0 = noisiest. Needed where ``eta`` is above 0; the caller draws it.
            enable_grad: Whether autograd records the run.

        Returns:
            Clean latents, ``(B, c, h, w)``, same dtype as ``noise``.

        Raises:
            ConfigError: If noise to inject is missing, or the steps do not fit the schedule.
        """
        with torch.set_grad_enabled(enable_grad):
            start = self.initial_scale(schedule) * noise
            return run_steps(self.steps(schedule), denoise, start, step_noise)


@dataclass(frozen=True, kw_only=True)
class DDIMSampler(LinearSampler):
    """DDIM (Song et al. 2021, eq. 12).

    Args:
        num_inference_steps: Steps T, at least 1.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        guidance_interval: Lowest and highest timestep that is guided; null guides all.
        guidance_interval_unit: ``timestep`` counts training timesteps; ``fraction`` is of the last.
        guidance_rescale: Share in [0, 1] of the guided output that is scaled back to the deviation
            of the conditional one.
        spacing: ``trailing`` starts at the last timestep; ``leading`` is the diffusers default of
            SD-1.5 with its offset of 1; ``linspace`` has both ends; ``official`` is the official
            LongAlign code's.
        eta: Injected noise, as a share of DDPM's: 0 is deterministic, 1 is DDPM. It is capped at
            all of the next level's noise, which ``inf`` asks for: the predicted clean latents are
            noised anew at each step, as latent consistency models sample.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if math.isnan(self.eta) or self.eta < 0:
            raise ConfigError(
                f"`eta` must be at least 0; got {self.eta}. Use 0 for none, 1 for DDPM."
            )

    def steps(self, schedule: NoiseSchedule) -> list[LinearStep]:
        """Tabulate the recursion; the last step ends at the predicted clean latents."""
        return ddim_steps(schedule, self.timesteps(schedule.num_timesteps), self.eta)


@dataclass(frozen=True, kw_only=True)
class EulerSampler(LinearSampler):
    """Euler's method in the noise-to-signal ratio (Karras et al. 2022, algorithm 1, no churn).

    In latents of unit variance, which is what the network sees, its steps are those of DDIM; the
    start is diffusers': noise that is scaled to the first level, without the rest of signal.

    Args:
        num_inference_steps: Steps T, at least 1.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        guidance_interval: Lowest and highest timestep that is guided; null guides all.
        guidance_interval_unit: ``timestep`` counts training timesteps; ``fraction`` is of the last.
        guidance_rescale: Share in [0, 1] of the guided output that is scaled back to the deviation
            of the conditional one.
        spacing: As for DDIM. diffusers' ``linspace`` has fractional timesteps; here they are whole.
        method: Always ``euler``: what tells a config's settings from those of DDIM.
    """

    method: Literal["euler"] = "euler"

    def initial_scale(self, schedule: NoiseSchedule) -> float:
        """Return the standard deviation of the first latents, 1 for ``leading``."""
        if self.spacing == "leading":
            return 1.0
        first = self.timesteps(schedule.num_timesteps)[0]
        return math.sqrt(1 - float(schedule.alphas_cumprod[first]))
