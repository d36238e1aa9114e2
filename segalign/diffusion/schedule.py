"""The variance-preserving noise schedule and its three output parameterisations.

Noise levels follow DDPM: ``x_t = alpha_t x_0 + sigma_t eps`` with ``alpha_t^2 + sigma_t^2 = 1``.
Dims: B batch, T training timesteps, c/h/w latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from segalign.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables in float64; never in the precision of the network.

    Attributes:
        alphas_cumprod: Squared signal level of each timestep, float64 ``(T,)``, decreasing.
        prediction_type: What the network's output means.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Build from a diffusers ``scheduler_config.json``.

        Raises:
            ConfigError: If the schedule or the parameterisation is not known.
        """
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in get_args(PredictionType):
            known = ", ".join(get_args(PredictionType))
            raise ConfigError(
                f"expected `prediction_type` among {known}; got `{prediction_type}`. Choose one."
            )
        levels = (1 - _betas(config)).cumprod(0)
        if config.get("rescale_betas_zero_snr"):
            if prediction_type == "epsilon":
                raise ConfigError(
                    "expected `prediction_type` v_prediction or sample with "
                    "`rescale_betas_zero_snr`; got epsilon, which says nothing of pure noise. "
                    "Change one of them."
                )
            levels = _zero_terminal_snr(levels)
        return cls(levels, prediction_type)

    @property
    def num_timesteps(self) -> int:
        """Number of training timesteps T."""
        return len(self.alphas_cumprod)

    def betas(self) -> Tensor:
        """Return the noise added at each timestep, float64 ``(T,)``: what the levels come from."""
        levels = self.alphas_cumprod
        return 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])

    def levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up (alpha_t, sigma_t), shaped to broadcast against a batch.

        Args:
            timesteps: int64 ``(B,)``.
            like: Tensor ``(B, ...)`` that gives dtype, device and number of dims.

        Returns:
            Two tensors ``(B, 1, ..., 1)``, computed in float64 and cast last.
        """
        squared = self.alphas_cumprod[timesteps.cpu()].view(-1, *[1] * (like.dim() - 1))
        return squared.sqrt().to(like), (1 - squared).sqrt().to(like)

    def shifted_timesteps(self, draws: Tensor, shift: float) -> Tensor:
        """Map uniform draws to timesteps, ``u -> s u / (1 + (s - 1) u)``.

        Args:
            draws: In [0, 1), ``(B,)``.
            shift: s > 0; 1 is uniform, above 1 prefers noisy timesteps.

        Returns:
            int64 ``(B,)``.

        Reference: arXiv 2403.03206, eq. 23.
        """
        shifted = shift * draws / (1 + (shift - 1) * draws)
        return (shifted * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Diffuse latents: ``alpha_t x_0 + sigma_t eps``."""
        alpha, sigma = self.levels(timesteps, latents)
        return alpha * latents + sigma * noise

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network should output: eps, ``alpha eps - sigma x_0`` or ``x_0``."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self.levels(timesteps, latents)
        return alpha * noise - sigma * latents


def _betas(config: Mapping[str, Any]) -> Tensor:
    """Return the noise added at each timestep, float64 ``(T,)``."""
    if (trained := config.get("trained_betas")) is not None:
        return torch.tensor(trained, dtype=torch.float64)
    num_timesteps = config.get("num_train_timesteps", 1000)
    beta_start, beta_end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if kind == "scaled_linear":
        bounds = beta_start**0.5, beta_end**0.5
        return torch.linspace(*bounds, num_timesteps, dtype=torch.float64).square()
    if kind == "linear":
        return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    raise ConfigError(
        f"expected `beta_schedule` linear or scaled_linear; got `{kind}`. Convert it."
    )


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale signal levels so that the last is zero (arXiv 2305.08891, algorithm 1)."""
    levels = alphas_cumprod.sqrt()
    return ((levels - levels[-1]) * levels[0] / (levels[0] - levels[-1])).square()
