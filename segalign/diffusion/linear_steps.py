"""One step of a sampler, linear in the latents, the network's output and injected noise.

Scalars come from float64 tables. Dims: B batch, T inference steps, c/h/w latents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from segalign.diffusion.schedule import NoiseSchedule, PredictionType
from segalign.errors import ConfigError

Denoiser = Callable[[Tensor, int], Tensor]
StepNoise = Tensor | Callable[[int], Tensor]


@dataclass(frozen=True)
class LinearStep:
    """One step ``x' = a x + b output + noise eps``.

    The conversion of a v or sample prediction to noise is part of ``a`` and ``b``. Where a gradient
    must not pass through the input of the network, it must not pass through the input of that
    conversion either; then the same step is ``x' = carry x + (a - carry) sg(x) + b output + noise
    eps``, and the gradient of the clean latents with respect to an output is its ``b`` times the
    later steps' ``carry``.

    Attributes:
        timestep: Noise index at which the network is called.
        a: Factor of the latents.
        b: Factor of the network's output.
        noise: Standard deviation of the injected noise.
        carry: Factor of the latents where the output, as noise, is held fixed:
            ``alpha' / alpha``; None is ``a``, as it is for noise prediction.
    """

    timestep: int
    a: float
    b: float
    noise: float = 0.0
    carry: float | None = None

    @property
    def carried(self) -> float:
        """Factor of latents that carry gradient while the network's input is detached."""
        return self.a if self.carry is None else self.carry


@dataclass(frozen=True)
class Conversion:
    """Clean latents and noise from the latents and the network's output, at one noise level.

    ``x_0 = clean_latents x + clean_output output`` and
    ``eps = noise_latents x + noise_output output``.
    """

    clean_latents: float
    clean_output: float
    noise_latents: float
    noise_output: float

    @classmethod
    def at(cls, squared: float, kind: PredictionType) -> "Conversion":
        """Tabulate the factors at a squared signal level, by parameterisation.

        A level of zero (zero terminal SNR) has them for v and sample prediction.
        """
        alpha, sigma = math.sqrt(squared), math.sqrt(1 - squared)
        if kind == "epsilon":
            return cls(1 / alpha, -sigma / alpha, 0.0, 1.0)
        if kind == "v_prediction":
            return cls(alpha, -sigma, sigma, alpha)
        return cls(0.0, 1.0, 1 / sigma, -alpha / sigma)


def ddim_step(
    timestep: int, now: float, then: float, kind: PredictionType, eta: float = 0.0
) -> LinearStep:
    """Tabulate one DDIM step.

    Args:
        timestep: Noise index at which the network is called.
        now: Squared signal level of the latents.
        then: Squared signal level of the next latents; 1 is clean.
        kind: What the network's output means.
        eta: Share of DDPM's noise to inject; see `DDIMSampler`.

    Reference: Song et al. 2021, eq. 12 and 16.
    """
    convert = Conversion.at(now, kind)
    signal, sigma = math.sqrt(then), math.sqrt(1 - then)
    new = _share_of_new_noise(now, then, eta)
    direction = sigma * math.sqrt(1 - new)
    return LinearStep(
        timestep,
        a=signal * convert.clean_latents + direction * convert.noise_latents,
        b=signal * convert.clean_output + direction * convert.noise_output,
        noise=sigma * math.sqrt(new),
        # Pure noise is a first input: nothing before it could carry a gradient.
        carry=math.sqrt(then / now) if now > 0 else 0.0,
    )


def clean_step(schedule: NoiseSchedule, timestep: int) -> LinearStep:
    """Tabulate the step to the predicted clean latents: the last, or an early stop."""
    now = float(schedule.alphas_cumprod[timestep])
    return ddim_step(timestep, now, 1.0, schedule.prediction_type)


def ddim_steps(schedule: NoiseSchedule, timesteps: Sequence[int], eta: float) -> list[LinearStep]:
    """Tabulate DDIM through given timesteps; the last step ends at the predicted clean latents."""
    squared = [float(schedule.alphas_cumprod[timestep]) for timestep in timesteps] + [1.0]
    return [
        ddim_step(timestep, now, then, schedule.prediction_type, eta)
        for timestep, now, then in zip(timesteps, squared[:-1], squared[1:], strict=True)
    ]


def run_steps(
    steps: Sequence[LinearStep],
    denoise: Denoiser,
    latents: Tensor,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Run a recursion, in the caller's gradient mode.

    Args:
        steps: The steps, noisiest first.
        denoise: Network call ``(latents, timestep) -> output``, guidance included.
        latents: Starting latents ``(B, c, h, w)``.
        step_noise: Standard normal noise to inject, by step index; see `noise_at`.

    Returns:
        Latents after the last step, ``(B, c, h, w)``.

    Raises:
        ConfigError: If a step injects noise and none is given.
    """
    for step_index, step in enumerate(steps):
        # The network sees the latents of this step, so they are replaced after the call.
        latents = step.a * latents + step.b * denoise(latents, step.timestep)
        if step.noise:
            latents = latents + step.noise * noise_at(step_noise, step_index).to(latents)
    return latents


def noise_at(step_noise: StepNoise | None, step_index: int) -> Tensor:
    """Look up the noise that a step injects.

    Args:
        step_noise: ``(T, B, c, h, w)``, or a function of the step index, 0 = noisiest; never drawn
            from torch's global generator, so that a run can be repeated.
        step_index: Position in the sampler's loop.

    Raises:
        ConfigError: If there is none.
    """
    if step_noise is None:
        raise ConfigError(
            "expected noise for every step of a sampler with `eta` > 0; got none. "
            "Pass `step_noise`, or set `eta` to 0."
        )
    return step_noise[step_index] if isinstance(step_noise, Tensor) else step_noise(step_index)


def _share_of_new_noise(now: float, then: float, eta: float) -> float:
    """Share of the next level's noise variance that is injected, in [0, 1]."""
    # A share, since the rest as a difference of variances would not come out as zero.
    return min(eta**2 * (1 - now / then) / (1 - now), 1.0) if math.isfinite(eta) else 1.0
