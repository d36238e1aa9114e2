"""DDIM that clips the predicted clean latents, for models whose range is known.

Not linear in the network's output where it clips. Dims: B batch, T inference steps, c/h/w latents.
"""

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from segalign.diffusion.linear_path import LinearPath
from segalign.diffusion.linear_steps import (
    Conversion,
    Denoiser,
    LinearStep,
    StepNoise,
    ddim_step,
    noise_at,
)
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.schedule import NoiseSchedule, PredictionType
from segalign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ClippedStep:
    """One step ``x' = signal clamp(x_0) + direction eps_hat + noise eps``.

    The predicted noise ``eps_hat`` is that of the output, not of the clipped clean latents, as
    diffusers' DDIM has it.

    Attributes:
        timestep: Noise index at which the network is called.
        convert: From latents and output to clean latents and noise.
        signal: Signal level of the next latents.
        direction: Factor of the predicted noise.
        noise: Standard deviation of the injected noise.
        carry: Derivative of the clean latents by the latents where the predicted noise is held
            fixed: ``1 / alpha``, and 0 for pure noise.
        clip_range: Bound of the clean latents.
    """

    timestep: int
    convert: Conversion
    signal: float
    direction: float
    noise: float
    carry: float
    clip_range: float

    @classmethod
    def between(
        cls,
        timestep: int,
        now: float,
        then: float,
        kind: PredictionType,
        *,
        eta: float,
        clip_range: float,
    ) -> "ClippedStep":
        """Tabulate a step between two squared signal levels; 1 is clean."""
        # Given the clean latents, the latents enter the next ones by way of the noise alone.
        given_clean = ddim_step(timestep, now, then, "sample", eta)
        return cls(
            timestep=timestep,
            convert=Conversion.at(now, kind),
            signal=math.sqrt(then),
            direction=given_clean.a * math.sqrt(1 - now),
            noise=given_clean.noise,
            carry=1 / math.sqrt(now) if now > 0 else 0.0,
            clip_range=clip_range,
        )

    def advance(self, latents: Tensor, output: Tensor, *, detach_input: bool = False) -> Tensor:
        """Take the step, without the injected noise.

        Args:
            latents: ``(B, c, h, w)``.
            output: The network's output, ``(B, c, h, w)``; carries gradient where nothing clips.
            detach_input: Whether the gradient of the latents does not pass through the conversion
                of the output to noise; see `LinearStep`.

        Returns:
            Next latents ``(B, c, h, w)``.
        """
        convert, seen = self.convert, latents.detach() if detach_input else latents
        clean = convert.clean_latents * seen + convert.clean_output * output
        if detach_input and latents.requires_grad:
            clean = clean + self.carry * (latents - seen)
        moved = self.signal * clean.clamp(-self.clip_range, self.clip_range)
        if not self.direction:
            return moved
        predicted = convert.noise_latents * seen + convert.noise_output * output
        return moved + self.direction * predicted


@dataclass(frozen=True, kw_only=True)
class ClippedSampler(DDIMSampler):
    """DDIM whose predicted clean latents are clipped: diffusers' with ``clip_sample``.

    For models in a known range: pixels, latent consistency models of such, or scaled latents.
    Gradients are for the graph engine; where a value is clipped they are zero.

    Args:
        num_inference_steps: Steps T, at least 1.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        guidance_interval: Lowest and highest timestep that is guided; null guides all.
        guidance_interval_unit: ``timestep`` counts training timesteps; ``fraction`` is of the last.
        guidance_rescale: Share in [0, 1] of the guided output that is scaled back to the deviation
            of the conditional one.
        spacing: As for DDIM.
        eta: As for DDIM.
        clip_range: Bound of the absolute values, above 0.
    """

    clip_range: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if not (math.isfinite(self.clip_range) and self.clip_range > 0):
            raise ConfigError(
                f"`clip_range` must be above 0; got {self.clip_range}. Use a sampler that does "
                "not clip, or correct it."
            )

    def steps(self, schedule: NoiseSchedule) -> list[LinearStep]:
        """Refuse: there are no linear steps.

        Raises:
            ConfigError: Always.
        """
        self._refuse()

    def path(self, schedule: NoiseSchedule) -> LinearPath:
        """Refuse: there is no linear map.

        Raises:
            ConfigError: Always.
        """
        self._refuse()

    def clipped_steps(self, schedule: NoiseSchedule) -> tuple[ClippedStep, ...]:
        """Tabulate the T steps, noisiest first; the last one ends at clipped clean latents.

        Raises:
            ConfigError: If there are fewer training timesteps than inference steps.
        """
        timesteps = self.timesteps(schedule.num_timesteps)
        levels = [float(schedule.alphas_cumprod[timestep]) for timestep in timesteps] + [1.0]
        return tuple(
            ClippedStep.between(
                timestep,
                now,
                then,
                schedule.prediction_type,
                eta=self.eta,
                clip_range=self.clip_range,
            )
            for timestep, now, then in zip(timesteps, levels[:-1], levels[1:], strict=True)
        )

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        step_noise: StepNoise | None = None,
        enable_grad: bool = False,
    ) -> Tensor:
        """Run the steps: see `LinearSampler.sample`."""
        with torch.set_grad_enabled(enable_grad):
            latents = self.initial_scale(schedule) * noise
            for step_index, step in enumerate(self.clipped_steps(schedule)):
                latents = step.advance(latents, denoise(latents, step.timestep))
                if step.noise:
                    latents = latents + step.noise * noise_at(step_noise, step_index).to(latents)
            return latents

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"expected a sampler that is linear in the outputs; got one that clips at "
            f"{self.clip_range}, which exact replay cannot serve. Use the graph engine "
            "(`engine: graph`), or a sampler that does not clip."
        )
