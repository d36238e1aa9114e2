"""The part of a sampler's run that a plan uses, and what its latents carry of the gradient.

Dims: N steps of the sampler, T steps that run, B batch, c/h/w latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from segalign.diffusion.clipped_sampler import ClippedSampler, ClippedStep
from segalign.diffusion.linear_path import LinearPath
from segalign.diffusion.linear_steps import LinearStep, clean_step
from segalign.diffusion.sampler import LinearSampler
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import Sampler
from segalign.errors import ConfigError
from segalign.truncation.noise import RolloutNoise
from segalign.truncation.plan import TruncationPlan


@dataclass(frozen=True, eq=False)
class Chain:
    """The T steps up to the scored image.

    Attributes:
        plan: The plan that it was made for.
        timesteps: Noise indices of the steps, noisiest first, ``T`` of them.
        linear_path: The run as one linear map; None for a sampler that clips.
        steps: The same as a recursion, or None for multistep samplers and those that clip.
        clean_step: From latents at the last timestep to their clean latents, before clipping.
        level: Signal and noise level (alpha, sigma) of the last timestep.
        clipped: Steps of a sampler that clips; else None.
    """

    plan: TruncationPlan
    timesteps: tuple[int, ...]
    linear_path: LinearPath | None
    steps: tuple[LinearStep, ...] | None
    clean_step: LinearStep
    level: tuple[float, float]
    clipped: tuple[ClippedStep, ...] | None = None

    @classmethod
    def of(cls, sampler: Sampler, schedule: NoiseSchedule, plan: TruncationPlan) -> "Chain":
        """Cut a sampler's run where the plan scores the image.

        Args:
            sampler: A sampler that is linear in the outputs, or clips.
            schedule: Noise levels and parameterisation.
            plan: The plan, for the sampler's number of steps.

        Raises:
            ConfigError: If the plan is for another number of steps, a step is not linear, or the
                plan normalises and the sampler clips.
        """
        if isinstance(sampler, ClippedSampler):
            return cls.from_clipped_steps(sampler.clipped_steps(schedule), schedule, plan)
        if isinstance(sampler, LinearSampler):
            scale = sampler.initial_scale(schedule)
            return cls.from_steps(sampler.steps(schedule), schedule, plan, scale)
        return cls.from_path(sampler.path(schedule), schedule, plan)

    @classmethod
    def from_steps(
        cls,
        steps: Sequence[LinearStep],
        schedule: NoiseSchedule,
        plan: TruncationPlan,
        initial_scale: float = 1.0,
    ) -> "Chain":
        """Cut a recursion where the plan scores the image.

        Args:
            steps: The sampler's N steps, noisiest first; the last one ends at clean latents.
            schedule: Noise levels and parameterisation.
            plan: The plan.
            initial_scale: Factor of the noise in the first latents.

        Raises:
            ConfigError: If the plan is for another number of steps, or a step is not linear.
        """
        _check_linear(steps)
        _check_length(len(steps), plan)
        kept = list(steps[: plan.last_step + 1])
        last = clean_step(schedule, kept[-1].timestep)
        if not plan.scores_final:
            kept[-1] = last
        path = LinearPath.from_steps(kept, initial_scale)
        return cls(plan, path.timesteps, path, tuple(kept), last, _level(schedule, last))

    @classmethod
    def from_path(cls, path: LinearPath, schedule: NoiseSchedule, plan: TruncationPlan) -> "Chain":
        """Cut a linear map, that of a multistep sampler: see `from_steps`."""
        _check_length(len(path.timesteps), plan)
        last = clean_step(schedule, path.timesteps[plan.last_step])
        if not plan.scores_final:
            path = path.stop_at(plan.last_step, schedule)
        return cls(plan, path.timesteps, path, None, last, _level(schedule, last))

    @classmethod
    def from_clipped_steps(
        cls, steps: Sequence[ClippedStep], schedule: NoiseSchedule, plan: TruncationPlan
    ) -> "Chain":
        """Cut the steps of a sampler that clips; the graph engine alone can run it.

        Raises:
            ConfigError: If the plan is for another number of steps, or normalises.
        """
        _check_length(len(steps), plan)
        if plan.normalize:
            raise ConfigError(
                "expected no `normalize` with a sampler that clips, whose outputs have no fixed "
                "factors; got true. Set it to false, or use a sampler that does not clip."
            )
        kept = list(steps[: plan.last_step + 1])
        last = clean_step(schedule, kept[-1].timestep)
        if not plan.scores_final:
            kept[-1] = replace(kept[-1], signal=1.0, direction=0.0, noise=0.0)
        timesteps = tuple(step.timestep for step in kept)
        return cls(plan, timesteps, None, None, last, _level(schedule, last), tuple(kept))

    @property
    def path(self) -> LinearPath:
        """The run as one linear map.

        Raises:
            ConfigError: If the sampler clips.
        """
        if self.linear_path is None:
            raise ConfigError(
                "expected a sampler that is linear in the outputs; got one that clips. Use a "
                "sampler that does not clip."
            )
        return self.linear_path

    @property
    def factors(self) -> tuple[float, ...]:
        """Factor c_t of each output in the scored clean latents, inputs detached, float64.

        For DDIM, with ``r = sigma / alpha``, ``r'`` that of the next point and 0 at the scored
        step: noise prediction ``r' - r``; v ``alpha (r' - r)``; sample ``1 - r' / r``.

        Raises:
            ConfigError: If the sampler clips.
        """
        return tuple(self.path.gradient_factors.tolist())

    @property
    def trained_factors(self) -> dict[int, float]:
        """Factors of the trained steps, normalised if so planned; none if the sampler clips."""
        if self.clipped is not None:
            return {}
        return {index: self.weight * self.factors[index] for index in self.plan.train_steps}

    @property
    def weight(self) -> float:
        """Factor of the whole gradient: 1, or one over the sum of ``|c_t|`` of trained steps."""
        if not self.plan.normalize:
            return 1.0
        return 1 / sum(abs(self.factors[index]) for index in self.plan.train_steps)

    @property
    def image_weight(self) -> float:
        """Factor of the gradient of each scored image."""
        images = 1 + self.plan.num_renoised if self.plan.reduction == "mean" else 1
        return self.weight / images

    def clean(self, latents: Tensor, output: Tensor) -> Tensor:
        """Predict clean latents ``(M, c, h, w)`` from latents at the last timestep."""
        clean = self.clean_step.a * latents + self.clean_step.b * output
        if self.clipped is None:
            return clean
        bound = self.clipped[-1].clip_range
        return clean.clamp(-bound, bound)

    def walk(self, noise: RolloutNoise) -> "Walk":
        """Start a run."""
        if self.clipped is not None:
            return _ClippedWalk(self.clipped, noise, detach_input=self.plan.detach_input)
        return _RecursiveWalk(self, noise) if self.steps else _SummedWalk(self, noise)


class Walk(Protocol):
    """A run in progress, in the caller's gradient mode.

    Attributes:
        latents: What the network sees next, or the clean latents, ``(B, c, h, w)``. They carry
            the gradient of earlier outputs, as the plan says.
    """

    latents: Tensor

    def advance(self, output: Tensor) -> None:
        """Take a step with the network's output ``(B, c, h, w)``, which may carry gradient."""


class _RecursiveWalk:
    """Steps of a recursion."""

    def __init__(self, chain: Chain, noise: RolloutNoise) -> None:
        self._chain, self._noise, self._index = chain, noise, 0
        self.latents = float(chain.path.noise_coefficients[0]) * noise.initial()

    def advance(self, output: Tensor) -> None:
        """Take a step."""
        step = (self._chain.steps or ())[self._index]
        latents = self.latents
        if self._chain.plan.detach_input and latents.requires_grad:
            # The value of `a x`, with the gradient of `carry x`.
            values = latents.detach()
            carried = step.a * values + step.carried * (latents - values)
        else:
            carried = step.a * latents
        latents = carried + step.b * output
        if step.noise:
            latents = latents + step.noise * self._noise.of_step(self._index)
        self.latents, self._index = latents, self._index + 1


class _ClippedWalk:
    """Steps that clip the predicted clean latents."""

    def __init__(
        self, steps: Sequence[ClippedStep], noise: RolloutNoise, *, detach_input: bool
    ) -> None:
        self._steps, self._noise, self._index = steps, noise, 0
        self._detach_input = detach_input
        self.latents = noise.initial()

    def advance(self, output: Tensor) -> None:
        """Take a step."""
        step = self._steps[self._index]
        latents = step.advance(self.latents, output, detach_input=self._detach_input)
        if step.noise:
            latents = latents + step.noise * self._noise.of_step(self._index)
        self.latents, self._index = latents, self._index + 1


class _SummedWalk:
    """Steps of a linear map; keeps every output."""

    def __init__(self, chain: Chain, noise: RolloutNoise) -> None:
        self._chain, self._noise = chain, noise
        self._initial = noise.initial()
        self._outputs: list[Tensor] = []
        self.latents = float(chain.path.noise_coefficients[0]) * self._initial

    def advance(self, output: Tensor) -> None:
        """Take a step."""
        self._outputs.append(output)
        path, index = self._chain.path, len(self._outputs)
        if not self._chain.plan.detach_input:
            self.latents = path.latents(index, self._initial, self._outputs, self._noise.of_step)
            return
        values = [kept.detach() for kept in self._outputs]
        latents = path.latents(index, self._initial, values, self._noise.of_step)
        for j, (kept, value) in enumerate(zip(self._outputs, values, strict=True)):
            if kept.requires_grad:
                # The gradient of `gradient_coefficients`, without a value of its own.
                latents = latents + float(path.gradient_coefficients[index, j]) * (kept - value)
        self.latents = latents


def _check_linear(steps: Sequence[object]) -> None:
    if others := [step for step in steps if not isinstance(step, LinearStep)]:
        raise ConfigError(
            f"expected steps that are linear in the output; got `{type(others[0]).__name__}`. "
            "Use a sampler whose steps are linear; for one that clips, `ClippedSampler`."
        )


def _check_length(num_steps: int, plan: TruncationPlan) -> None:
    if num_steps != plan.num_steps:
        raise ConfigError(
            f"expected a sampler of {plan.num_steps} steps, as the plan has; got {num_steps}. "
            "Plan for the sampler's own number of steps."
        )


def _level(schedule: NoiseSchedule, step: LinearStep) -> tuple[float, float]:
    squared = float(schedule.alphas_cumprod[step.timestep])
    return squared**0.5, (1 - squared) ** 0.5
