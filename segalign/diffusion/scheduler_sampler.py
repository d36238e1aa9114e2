"""Samplers of diffusers, driven like our own.

Dims: B batch, T inference steps, c/h/w latents.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from segalign.diffusion.sampler import DDIMSampler, Denoiser
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError

SchedulerName = Literal["ddim", "unipc", "dpmpp"]
Spacing = Literal["trailing", "leading", "linspace"]


class Sampler(Protocol):
    """Whatever turns noise into clean latents with a denoiser."""

    @property
    def num_inference_steps(self) -> int:
        """Number of steps T."""

    @property
    def guidance_scale(self) -> float:
        """Factor of classifier-free guidance; 1 is off."""

    @property
    def spacing(self) -> Spacing:
        """Which timesteps the steps are taken at."""

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        enable_grad: bool = False,
    ) -> Tensor:
        """Map standard normal latents ``(B, c, h, w)`` to clean latents."""


@dataclass(frozen=True, kw_only=True)
class SchedulerSampler:
    """A scheduler of diffusers with this model's noise levels.

    Few steps: ``unipc`` and ``dpmpp`` are of second order and need fewer than DDIM.

    Args:
        scheduler: ``unipc`` (Zhao et al. 2023), ``dpmpp`` (DPM-Solver++ 2M, Lu et al. 2022) or
            ``ddim``. diffusers' DDIM takes steps of ``T_train // T``, ours lead to the next
            timestep: they agree where T divides the number of training timesteps.
        num_inference_steps: Steps T, at least 1.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        spacing: ``trailing`` starts at the last timestep; ``leading`` is SD-1.5's, with its offset
            of 1; ``linspace`` is the default that these schedulers have in diffusers.
    """

    scheduler: SchedulerName = "unipc"
    num_inference_steps: int = 25
    guidance_scale: float = 1.0
    spacing: Spacing = "trailing"

    def __post_init__(self) -> None:
        """Check the settings."""
        choices = {"scheduler": SchedulerName, "spacing": Spacing}
        for name, choice in choices.items():
            if (value := getattr(self, name)) not in get_args(choice):
                known = ", ".join(f"`{option}`" for option in get_args(choice))
                raise ConfigError(f"`{name}` must be one of {known}; got {value!r}. Choose one.")
        if self.num_inference_steps < 1:
            raise ConfigError(
                f"`num_inference_steps` must be at least 1; got {self.num_inference_steps}. "
                "Raise it."
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

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        enable_grad: bool = False,
    ) -> Tensor:
        """Run the scheduler.

        Args:
            denoise: Network call ``(latents, timestep) -> output``, guidance included.
            noise: Starting latents, standard normal, ``(B, c, h, w)``.
            schedule: Noise levels and parameterisation.
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
    name: SchedulerName,
    num_inference_steps: int,
    guidance_scale: float,
    spacing: Spacing = "trailing",
) -> Sampler:
    """Make the sampler that a name stands for; ``ddim`` is our own where it has the spacing."""
    if name == "ddim" and spacing != "linspace":
        return DDIMSampler(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, spacing=spacing
        )
    return SchedulerSampler(
        scheduler=name,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        spacing=spacing,
    )


def change_sampler(
    sampler: Sampler,
    name: SchedulerName | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Sampler:
    """Make a sampler with some settings changed; None leaves a setting as it is."""
    return make_sampler(
        name or sampler_name(sampler),
        sampler.num_inference_steps if num_inference_steps is None else num_inference_steps,
        sampler.guidance_scale if guidance_scale is None else guidance_scale,
        sampler.spacing,
    )


def sampler_name(sampler: Sampler) -> SchedulerName:
    """Return the name of a sampler, as `make_sampler` takes it."""
    return sampler.scheduler if isinstance(sampler, SchedulerSampler) else "ddim"


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
    # The schedulers multiply betas up in float32; the table is ours, in float64.
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    return scheduler
