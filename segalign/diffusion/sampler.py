"""Deterministic DDIM as a linear recursion in the latents and the network's output.

Every step is ``x' = a x + b output``; the conversion of a v or sample prediction to noise is part
of ``a`` and ``b``, which come from float64 tables. Dims: B batch, T inference steps, c/h/w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from segalign.diffusion.schedule import NoiseSchedule, PredictionType
from segalign.errors import ConfigError

Denoiser = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class LinearStep:
    """One step of a sampler.

    Attributes:
        timestep: Noise index at which the network is called.
        a: Factor of the latents.
        b: Factor of the network's output.
    """

    timestep: int
    a: float
    b: float


@dataclass(frozen=True, kw_only=True)
class DDIMSampler:
    """DDIM with eta = 0 (Song et al. 2021, eq. 12).

    Args:
        num_inference_steps: Steps T, at least 1.
        guidance_scale: Factor of classifier-free guidance; 1 is off.
        spacing: ``trailing`` starts at the last timestep; ``leading`` is the diffusers default of
            SD-1.5 with its offset of 1.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 1.0
    spacing: Literal["trailing", "leading"] = "trailing"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ConfigError(
                f"`num_inference_steps` must be at least 1; got {self.num_inference_steps}. "
                "Raise it."
            )

    def timesteps(self, num_timesteps: int) -> list[int]:
        """Choose the noise indices, noisiest first.

        Raises:
            ConfigError: If there are fewer training timesteps than inference steps.
        """
        steps = self.num_inference_steps
        if steps > num_timesteps:
            raise ConfigError(
                f"`num_inference_steps` must be <= {num_timesteps}; got {steps}. Lower it."
            )
        if self.spacing == "trailing":
            return [round(num_timesteps * (1 - i / steps)) - 1 for i in range(steps)]
        stride = num_timesteps // steps
        return [min(i * stride + 1, num_timesteps - 1) for i in reversed(range(steps))]

    def steps(self, schedule: NoiseSchedule) -> list[LinearStep]:
        """Tabulate the recursion; the last step ends at the predicted clean latents."""
        timesteps = self.timesteps(schedule.num_timesteps)
        squared = [float(schedule.alphas_cumprod[timestep]) for timestep in timesteps] + [1.0]
        return [
            LinearStep(timestep, *_ddim_coefficients(now, then, schedule.prediction_type))
            for timestep, now, then in zip(timesteps, squared[:-1], squared[1:], strict=True)
        ]

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        schedule: NoiseSchedule,
        *,
        enable_grad: bool = False,
    ) -> Tensor:
        """Run the recursion.

        Args:
            denoise: Network call ``(latents, timestep) -> output``, guidance included.
            noise: Starting latents, standard normal, ``(B, c, h, w)``.
            schedule: Noise levels and parameterisation.
            enable_grad: Whether autograd records the run.

        Returns:
            Clean latents, ``(B, c, h, w)``, same dtype as ``noise``.
        """
        latents = noise
        with torch.set_grad_enabled(enable_grad):
            for step in self.steps(schedule):
                latents = step.a * latents + step.b * denoise(latents, step.timestep)
        return latents


def _ddim_coefficients(now: float, then: float, kind: PredictionType) -> tuple[float, float]:
    """Coefficients (a, b) of one DDIM step from squared signal level ``now`` to ``then``."""
    alpha, sigma = now**0.5, (1 - now) ** 0.5
    alpha_next, sigma_next = then**0.5, (1 - then) ** 0.5
    # x0 = x0_x x + x0_o output and eps = eps_x x + eps_o output, by parameterisation.
    x0_x, x0_o, eps_x, eps_o = {
        "epsilon": (1 / alpha, -sigma / alpha, 0.0, 1.0),
        "v_prediction": (alpha, -sigma, sigma, alpha),
        "sample": (0.0, 1.0, 1 / sigma, -alpha / sigma),
    }[kind]
    return alpha_next * x0_x + sigma_next * eps_x, alpha_next * x0_o + sigma_next * eps_o
