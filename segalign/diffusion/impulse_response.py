"""The linear map that a scheduler of diffusers is, found by feeding it unit impulses.

Multistep solvers use earlier outputs and correct earlier latents, so their steps have no short
formula here; but with a noise prediction as input they are linear, so one run with a unit impulse
in the starting noise and one in each output, side by side as a batch, finds every coefficient.
Dims: T inference steps.
"""

import copy
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from segalign.diffusion.linear_path import LinearPath
from segalign.diffusion.linear_steps import Conversion
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError

# diffusers' stand-in for a signal level of zero, which multistep solvers cannot divide by.
SMALLEST_LEVEL = 2.0**-24
_LINEAR = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
_CLOSE = 1e-4


def impulse_response(scheduler: Any, schedule: NoiseSchedule) -> LinearPath:
    """Find the linear map of a scheduler.

    Args:
        scheduler: DDIM (eta = 0), Euler, DPM-Solver++ or UniPC of diffusers, its timesteps set by
            their number. It is not changed.
        schedule: The same noise levels in float64, and the parameterisation.

    Returns:
        The path, in float64; where the scheduler's own tables are in float32, they differ by that.

    Raises:
        ConfigError: If the scheduler is not linear, or has other noise levels than ``schedule``.
    """
    _check_linear(scheduler)
    levels = schedule.alphas_cumprod.clamp(min=SMALLEST_LEVEL)
    probe = _noise_predicting(scheduler, levels)
    timesteps = [int(timestep) for timestep in probe.timesteps]
    _check_levels(scheduler, levels, timesteps)
    if hasattr(probe, "sigmas"):
        ratios = ((1 - levels) / levels).sqrt()[timesteps]
        probe.sigmas = torch.cat([ratios, probe.sigmas[-1:].double()])
    responses = _responses(probe)
    if not responses.isfinite().all():
        raise ConfigError(
            f"expected finite coefficients of `{type(scheduler).__name__}` with {len(timesteps)} "
            "steps; got NaN or infinity. Take fewer steps or another spacing."
        )
    squared = [float(levels[timestep]) for timestep in timesteps]
    conversions = [Conversion.at(level, schedule.prediction_type) for level in squared]
    return _with_outputs(tuple(timesteps), responses, conversions)


class _Unrounded(Tensor):
    """Float64 numbers that stay so where a scheduler casts its latents to float32."""

    def to(self, *_: Any, **__: Any) -> "_Unrounded":
        """Keep the precision."""
        return self


def _responses(scheduler: Any) -> Tensor:
    """Feed unit impulses.

    Returns:
        float64 ``(T + 1, 1 + T)``: what the network sees at each step, and the clean latents, by
        starting noise and by predicted noise of each step.
    """
    num_steps = len(scheduler.timesteps)
    impulses = torch.eye(1 + num_steps, dtype=torch.float64).as_subclass(_Unrounded)
    latents = impulses[:, :1] * float(scheduler.init_noise_sigma)
    seen = []
    with torch.no_grad():
        for k, timestep in enumerate(scheduler.timesteps):
            seen.append(scheduler.scale_model_input(latents, timestep))
            predicted = impulses[:, k + 1 : k + 2]
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return torch.cat([*seen, latents], dim=1).T.as_subclass(Tensor)


def _with_outputs(
    timesteps: tuple[int, ...], responses: Tensor, conversions: list[Conversion]
) -> LinearPath:
    """Express predicted noise, ``eps_j = p_j x_j + q_j output_j``, by outputs."""
    by_latents = responses.new_tensor([convert.noise_latents for convert in conversions])
    by_output = responses.new_tensor([convert.noise_output for convert in conversions])
    noise, predicted = responses[:, 0].clone(), responses[:, 1:]
    gradient = predicted * by_output
    output = gradient.clone()
    for k in range(1, len(noise)):
        through_latents = predicted[k, :k] * by_latents[:k]
        noise[k] += through_latents @ noise[:k]
        output[k] += through_latents @ output[:k]
    return LinearPath(timesteps, noise, output, torch.zeros_like(output), gradient)


def _noise_predicting(scheduler: Any, levels: Tensor) -> Any:
    """Copy a scheduler, unused, for noise prediction on given levels."""
    probe = copy.deepcopy(scheduler)
    probe.register_to_config(prediction_type="epsilon")
    probe.alphas_cumprod = levels
    probe.set_timesteps(len(scheduler.timesteps))
    return probe


def _check_linear(scheduler: Any) -> None:
    """Refuse what is not linear in the outputs, or draws noise of its own."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, _LINEAR):
        known = ", ".join(f"`{kind.__name__}`" for kind in _LINEAR)
        raise ConfigError(
            f"expected a scheduler that is linear in its outputs ({known}); got `{name}`. Use one."
        )
    config = scheduler.config
    others = {
        "thresholding": "choose another sampler",
        "clip_sample": "use `segalign.diffusion.clipped_sampler.ClippedSampler` with the graph "
        "engine",
    }
    for setting, other in others.items():
        if config.get(setting):
            raise ConfigError(
                f"expected `{name}` without `{setting}`, which is not linear in the outputs; got "
                f"{config[setting]}. Set it to false, or {other}."
            )
    if str(config.get("algorithm_type", "")).startswith("sde"):
        raise ConfigError(
            f"expected `{name}` without noise of its own; got `{config['algorithm_type']}`. "
            "Use `dpmsolver++`."
        )


def _check_levels(scheduler: Any, levels: Tensor, timesteps: list[int]) -> None:
    """Refuse a scheduler whose noise levels are not those of its timesteps in the schedule."""
    whole = all(float(timestep).is_integer() for timestep in scheduler.timesteps)
    known = levels[timesteps]
    if hasattr(scheduler, "sigmas"):
        own = 1 / (1 + scheduler.sigmas[:-1].double() ** 2)
    else:
        own = scheduler.alphas_cumprod[timesteps].double()
    if not whole or len(own) != len(known) or not torch.allclose(own, known, rtol=_CLOSE, atol=0):
        raise ConfigError(
            f"expected `{type(scheduler).__name__}` with the noise levels of the model at whole "
            "timesteps; got others. Remove other sigmas (Karras, exponential, beta, flow), or "
            "take another spacing."
        )
