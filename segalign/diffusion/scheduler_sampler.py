"""Samplers of diffusers, driven like our own.

Dims: B batch, T inference steps, c/h/w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from segalign.diffusion.guidance import Guidance, IntervalUnit
from segalign.diffusion.impulse_response import SMALLEST_LEVEL, impulse_response
from segalign.diffusion.linear_path import LinearPath
from segalign.diffusion.sampler import (
    DDIMSampler,
    Denoiser,
    EulerSampler,
    LinearSampler,
    StepNoise,
)
from segalign.diffusion.sampler_guidance import SamplerGuidance
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.spacing import Spacing as Spacing
from segalign.diffusion.spacing import check_spacing
from segalign.errors import ConfigError

SchedulerName = Literal["ddim", "unipc", "dpmpp"]
SamplerName = Literal["ddim", "euler", "unipc", "dpmpp"]


class Sampler(Protocol):
    """Whatever turns noise into clean latents with a denoiser."""

    @property
    def num_inference_steps(self) -> int:
        """Number of steps T."""

    @property
    def guidance_scale(self) -> float:
        """Factor of classifier-free guidance; 1 is off."""

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance: its scale, where it acts, rescaling."""

    @property
    def spacing(self) -> Spacing:
        """Which timesteps the steps are taken at."""

    def path(self, schedule: NoiseSchedule) -> LinearPath:
        """Tabulate where each output ends up."""

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        step_noise: StepNoise | None = None,
        enable_grad: bool = False,
    ) -> Tensor:
        """Map standard normal latents ``(B, c, h, w)`` to clean latents."""


@dataclass(frozen=True, kw_only=True)
class SchedulerSampler(SamplerGuidance):
    """A scheduler of diffusers with this model's noise levels.

    Few steps: ``unipc`` and ``dpmpp`` are of second order and need fewer than DDIM.

    Args:
        scheduler: ``unipc`` (Zhao et al. 2023), ``dpmpp`` (DPM-Solver++ 2M, Lu et al. 2022) or
            ``ddim``. diffusers' DDIM takes steps of ``T_train // T``, ours lead to the next
            timestep: they agree where T divides the number of training timesteps.
        num_inference_steps: Steps T, at least 1.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        guidance_interval: Lowest and highest timestep that is guided; null guides all.
        guidance_interval_unit: ``timestep`` counts training timesteps; ``fraction`` is of the last.
        guidance_rescale: Share in [0, 1] of the guided output that is scaled back to the deviation
            of the conditional one.
        spacing: ``trailing`` starts at the last timestep; ``leading`` is SD-1.5's, with its offset
            of 1; ``linspace`` is the default that these schedulers have in diffusers.
    """

    scheduler: SchedulerName = "unipc"
    num_inference_steps: int = 25
    spacing: Spacing = "trailing"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.scheduler not in get_args(SchedulerName):
            known = ", ".join(f"`{option}`" for option in get_args(SchedulerName))
            raise ConfigError(
                f"`scheduler` must be one of {known}; got {self.scheduler!r}. Choose one."
            )
        check_spacing(self.num_inference_steps, self.spacing)
        if self.spacing == "official":
            raise ConfigError(
                f"expected a `spacing` that `{self.scheduler}` of diffusers has; got `official`. "
                "Use `trailing`, which is the same where the steps divide the timesteps."
            )

    def build(self, schedule: NoiseSchedule) -> Any:
        """Make the scheduler, its timesteps set.

        Raises:
            ConfigError: If the number of steps does not fit the schedule.
        """
        scheduler = _make_scheduler(self.scheduler, schedule, self.spacing)
        if self.num_inference_steps <= schedule.num_timesteps:
            scheduler.set_timesteps(self.num_inference_steps)
            # For some T the rounding of diffusers' trailing spacing yields one step too many.
            if len(scheduler.timesteps) == self.num_inference_steps:
                return scheduler
        raise ConfigError(
            f"expected a number of steps that `{self.scheduler}` with `{self.spacing}` spacing can "
            f"place on {schedule.num_timesteps} timesteps; got {self.num_inference_steps}. "
            "Take one less."
        )

    def path(self, schedule: NoiseSchedule) -> LinearPath:
        """Tabulate where each output ends up, by impulse response.

        Raises:
            ConfigError: If the number of steps does not fit the schedule.
        """
        return impulse_response(self.build(schedule), schedule)

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        step_noise: StepNoise | None = None,
        enable_grad: bool = False,
    ) -> Tensor:
        """Run the scheduler.

        Args:
            denoise: Network call ``(latents, timestep) -> output``, guidance included.
            noise: Starting latents, standard normal, ``(B, c, h, w)``.
            schedule: Noise levels and parameterisation.
            step_noise: Not used: these schedulers inject none.
            enable_grad: Whether autograd records the run.

        Returns:
            Clean latents, ``(B, c, h, w)``, same dtype as ``noise``.

        Raises:
            ConfigError: If the number of steps does not fit the schedule.
        """
        scheduler = self.build(schedule)
        latents = noise
        with torch.set_grad_enabled(enable_grad):
            for timestep in scheduler.timesteps:
                output = denoise(latents, int(timestep))
                latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        return latents


def make_sampler(
    name: SamplerName,
    num_inference_steps: int,
    guidance_scale: float,
    spacing: Spacing = "trailing",
    *,
    guidance_interval: Sequence[float] | None = None,
    guidance_interval_unit: IntervalUnit = "timestep",
    guidance_rescale: float = 0.0,
    eta: float = 0.0,
) -> Sampler:
    """Make the sampler that a name stands for.

    ``ddim`` is our own, except with ``linspace``, which exported folders know as diffusers'.
    """
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": None if guidance_interval is None else tuple(guidance_interval),
        "guidance_interval_unit": guidance_interval_unit,
        "guidance_rescale": guidance_rescale,
        "spacing": spacing,
    }
    if name == "euler":
        return EulerSampler(**settings)
    if name == "ddim" and spacing != "linspace":
        return DDIMSampler(eta=eta, **settings)
    return SchedulerSampler(scheduler=name, **settings)


def change_sampler(
    sampler: Sampler,
    name: SamplerName | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Sampler:
    """Make a sampler with some settings changed; None leaves a setting as it is.

    A scale of 1 turns guidance off, and its interval and rescaling with it.
    """
    own = sampler_name(sampler)
    steps = sampler.num_inference_steps if num_inference_steps is None else num_inference_steps
    scale = sampler.guidance_scale if guidance_scale is None else guidance_scale
    none: dict[str, Any] = {"guidance_interval": None, "guidance_rescale": 0.0}
    rest = none if scale == 1 else guidance_settings(sampler)
    if name in (None, own) and isinstance(sampler, LinearSampler | SchedulerSampler):
        return replace(sampler, num_inference_steps=steps, guidance_scale=scale, **rest)
    return make_sampler(name or own, steps, scale, sampler.spacing, **rest)


def guidance_settings(sampler: Sampler) -> dict[str, Any]:
    """Return a sampler's guidance, its scale left out, as `make_sampler` takes it."""
    guidance = sampler.guidance
    return {
        "guidance_interval": guidance.interval,
        "guidance_interval_unit": guidance.interval_unit,
        "guidance_rescale": guidance.rescale,
    }


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """Return what a sampler has besides steps, scale and spacing, as `make_sampler` takes it."""
    eta = sampler.eta if isinstance(sampler, DDIMSampler) else 0.0
    return guidance_settings(sampler) | ({"eta": eta} if eta else {})


def sampler_name(sampler: Sampler) -> SamplerName:
    """Return the name of a sampler, as `make_sampler` takes it."""
    if isinstance(sampler, SchedulerSampler):
        return sampler.scheduler
    return "euler" if isinstance(sampler, EulerSampler) else "ddim"


def _make_scheduler(name: SchedulerName, schedule: NoiseSchedule, spacing: Spacing) -> Any:
    """Make a scheduler with given noise levels, for latents that are not clipped."""
    common = {
        "num_train_timesteps": schedule.num_timesteps,
        "trained_betas": schedule.betas().tolist(),
        "prediction_type": schedule.prediction_type,
        "timestep_spacing": spacing,
        "steps_offset": 1 if spacing == "leading" else 0,
    }
    if name == "ddim":
        scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **common)
    elif name == "dpmpp":
        scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **common)
    else:
        scheduler = UniPCMultistepScheduler(**common)
    # The schedulers multiply betas up in float32; the table is ours, in float64. DDIM alone bears
    # a signal level of zero.
    lowest = 0.0 if name == "ddim" else SMALLEST_LEVEL
    scheduler.alphas_cumprod = schedule.alphas_cumprod.clamp(min=lowest)
    return scheduler
