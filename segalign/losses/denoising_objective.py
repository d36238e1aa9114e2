"""The denoising loss of given samples, with timesteps and noise that depend on counters alone.

Dims: B batch, c/h/w latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError
from segalign.losses.diffusion import denoising_loss, min_snr_weights
from segalign.rng import counter_normal, counter_uniform
from segalign.text.conditioning import TextConditioning

# (noisy latents (B, c, h, w), timesteps int64 (B,), text) -> output (B, c, h, w).
Predict = Callable[[Tensor, Tensor, TextConditioning], Tensor]


@dataclass(frozen=True, kw_only=True)
class DenoisingObjective:
    """Denoising of images at drawn timesteps: what supervised fine-tuning minimises.

    Args:
        seed: Seeds timesteps and noise.
        min_snr_gamma: Bound of the loss weights, above 0; None weighs all timesteps alike.
        timestep_shift: Above 1, noisy timesteps are drawn more often; above 0.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    seed: int = 0
    min_snr_gamma: float | None = None
    timestep_shift: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("min_snr_gamma", "timestep_shift"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"`{name}` must be above 0; got {value}. Correct it.")

    def losses(
        self,
        predict: Predict,
        schedule: NoiseSchedule,
        latents: Tensor,
        text: TextConditioning,
        counters: Sequence[tuple[int, ...]],
    ) -> Tensor:
        """Noise the latents and measure how well the network undoes it.

        Args:
            predict: Network call; carries gradient.
            schedule: Noise levels and parameterisation.
            latents: Clean latents ``(B, c, h, w)``.
            text: Conditioning of the B captions.
            counters: What the draws of each sample depend on besides the seed, ``B`` tuples of
                one length: optimizer step, epoch, sample id.

        Returns:
            Losses ``(B,)``, float32, not reduced.
        """
        keys = [(self.seed, *counter) for counter in counters]
        draws = torch.tensor([counter_uniform("timestep", *key) for key in keys])
        timesteps = schedule.shifted_timesteps(draws, self.timestep_shift).to(latents.device)
        noise = counter_normal("training noise", keys, latents.shape[1:]).to(latents)
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = predict(noisy, timesteps, text)
        losses = denoising_loss(output, schedule.training_target(latents, noise, timesteps))
        if self.min_snr_gamma is None:
            return losses
        return losses * min_snr_weights(schedule, timesteps, self.min_snr_gamma)
