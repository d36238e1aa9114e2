"""A whole sampling run as one linear map of its starting noise and the network's outputs.

What truncated back-propagation needs of a sampler: where each output ends up. Tables are float64.
Dims: B batch, T inference steps, c/h/w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.diffusion.linear_steps import (
    Denoiser,
    LinearStep,
    StepNoise,
    clean_step,
    noise_at,
)
from segalign.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class LinearPath:
    """The latents before each step and after the last, as sums.

    ``x_k = noise_coefficients[k] noise + sum_j output_coefficients[k, j] output_j
    + sum_j injected_coefficients[k, j] eps_j``, where ``x_k`` is what the network sees at step
    index k and ``x_T`` the clean latents. Rows use earlier columns alone.

    Attributes:
        timesteps: Noise indices of the steps, noisiest first, ``T`` of them.
        noise_coefficients: float64 ``(T + 1,)``; the first is the scale of the starting latents.
        output_coefficients: float64 ``(T + 1, T)``, the conversion of outputs to noise included:
            a gradient that passes through the latents into the network follows these.
        injected_coefficients: float64 ``(T + 1, T)``; zero for a deterministic sampler.
        gradient_coefficients: float64 ``(T + 1, T)``: derivative of ``x_k`` with respect to
            ``output_j`` where neither the network nor the conversion of its output to noise passes
            a gradient on to its input. For noise prediction equal to ``output_coefficients``.
    """

    timesteps: tuple[int, ...]
    noise_coefficients: Tensor
    output_coefficients: Tensor
    injected_coefficients: Tensor
    gradient_coefficients: Tensor

    @classmethod
    def from_steps(cls, steps: Sequence[LinearStep], initial_scale: float = 1.0) -> "LinearPath":
        """Multiply a recursion out.

        Args:
            steps: The steps, noisiest first.
            initial_scale: Factor of the noise in the first latents.
        """
        num_steps = len(steps)
        noise = torch.zeros(num_steps + 1, dtype=torch.float64)
        output, injected, gradient = noise.new_zeros(3, num_steps + 1, num_steps).unbind()
        noise[0] = initial_scale
        for k, step in enumerate(steps):
            noise[k + 1] = step.a * noise[k]
            output[k + 1] = step.a * output[k]
            injected[k + 1] = step.a * injected[k]
            gradient[k + 1] = step.carried * gradient[k]
            output[k + 1, k] = gradient[k + 1, k] = step.b
            injected[k + 1, k] = step.noise
        return cls(tuple(step.timestep for step in steps), noise, output, injected, gradient)

    @property
    def gradient_factors(self) -> Tensor:
        """Factor c_t of each output in the clean latents, inputs detached, float64 ``(T,)``."""
        return self.gradient_coefficients[-1]

    def stop_at(self, step_index: int, schedule: NoiseSchedule) -> "LinearPath":
        """End the run at the clean latents that one step predicts.

        Args:
            step_index: The last step that runs, 0 = noisiest.
            schedule: Noise levels and parameterisation.

        Returns:
            A path of ``step_index + 1`` steps.

        Raises:
            IndexError: If there is no such step.
        """
        if not 0 <= step_index < len(self.timesteps):
            raise IndexError(f"step {step_index} of {len(self.timesteps)}")
        step = clean_step(schedule, self.timesteps[step_index])
        kept = slice(step_index + 1)

        def extend(rows: Tensor, factor: float, own: float) -> Tensor:
            last = factor * rows[step_index, kept]
            last[step_index] = own
            return torch.cat([rows[kept, kept], last[None]])

        noise = self.noise_coefficients[kept]
        return LinearPath(
            self.timesteps[kept],
            torch.cat([noise, step.a * noise[-1:]]),
            extend(self.output_coefficients, step.a, step.b),
            extend(self.injected_coefficients, step.a, 0.0),
            extend(self.gradient_coefficients, step.carried, step.b),
        )

    def latents(
        self,
        step_index: int,
        noise: Tensor,
        outputs: Sequence[Tensor],
        step_noise: StepNoise | None = None,
    ) -> Tensor:
        """Sum up the latents before a step, or the clean latents.

        Args:
            step_index: 0 is the start, T the clean latents.
            noise: Starting noise ``(B, c, h, w)``.
            outputs: Outputs of the steps so far, each ``(B, c, h, w)``.
            step_noise: Standard normal noise that the steps inject.

        Returns:
            Latents ``(B, c, h, w)`` in the dtype of ``noise``, summed in float64: the terms are
            many times larger than their sum.
        """
        total = float(self.noise_coefficients[step_index]) * noise.double()
        for j in range(step_index):
            total = total + float(self.output_coefficients[step_index, j]) * outputs[j].double()
            if injected := float(self.injected_coefficients[step_index, j]):
                total = total + injected * noise_at(step_noise, j).to(total)
        return total.to(noise.dtype)

    def sample(
        self,
        denoise: Denoiser,
        noise: Tensor,
        *,
        step_noise: StepNoise | None = None,
        enable_grad: bool = False,
    ) -> Tensor:
        """Run the path; every output is kept.

        Args:
            denoise: Network call ``(latents, timestep) -> output``, guidance included.
            noise: Starting noise, standard normal, ``(B, c, h, w)``.
            step_noise: Standard normal noise that the steps inject.
            enable_grad: Whether autograd records the run.

        Returns:
            Clean latents ``(B, c, h, w)``, same dtype as ``noise``.
        """
        outputs: list[Tensor] = []
        with torch.set_grad_enabled(enable_grad):
            for step_index, timestep in enumerate(self.timesteps):
                latents = self.latents(step_index, noise, outputs, step_noise)
                outputs.append(denoise(latents, timestep))
            return self.latents(len(self.timesteps), noise, outputs, step_noise)
