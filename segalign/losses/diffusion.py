"""Denoising losses, one value per sample; the caller reduces.

Dims: B batch, c/h/w latents.
"""

import torch
from torch import Tensor

from segalign.diffusion.schedule import NoiseSchedule


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32 at least.

    Args:
        output: Network output, ``(B, c, h, w)``; carries gradient.
        target: What it should be, same shape.

    Returns:
        Losses ``(B,)``.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    return (output.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)


def min_snr_weights(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """Weights that bound the signal-to-noise ratio of the loss at gamma.

    Args:
        schedule: Noise levels and parameterisation.
        timesteps: int64 ``(B,)``.
        gamma: Bound, > 0; the paper recommends 5.

    Returns:
        Weights ``(B,)``, float32: ``min(snr, gamma)`` in units of the clean-latents error, which
        is divided by snr for epsilon and by snr + 1 for v predictions.

    Reference: arXiv 2303.09556, eq. 5 and section 3.4.
    """
    squared = schedule.alphas_cumprod[timesteps.cpu()]
    snr = squared / (1 - squared)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": snr * 0 + 1}
    weights = snr.clamp(max=gamma) / divisor[schedule.prediction_type]
    return weights.float().to(timesteps.device)
