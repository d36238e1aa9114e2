"""Exact replay: the gradient of a whole run from one (forward, backward) pair per trained step.

Where inputs are detached, the clean latents are a sum of the outputs, each times a constant c_t.
So the run needs no record: with g, the gradient of the loss at the clean latents, the gradient of
the weights is the sum over trained steps of the output's Jacobian applied to ``c_t g``.

Dims: B batch, K trained steps, M pairs of a micro-batch, c/h/w latents.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segalign.diffusion.linear_steps import Denoiser
from segalign.errors import ConfigError
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import Branch, GuidedDenoiser
from segalign.truncation.engine import (
    Backward,
    GradientReport,
    LossOfLatents,
    check_sizes,
    default_backward,
    gradient_of_loss,
    renoised,
    require_trainable,
)
from segalign.truncation.noise import RolloutNoise
from segalign.truncation.plan import TruncationPlan


@dataclass(frozen=True, eq=False)
class _TrainedCall:
    """One call of the network that is trained, for the whole batch."""

    step_index: int
    timestep: int
    latents: Tensor
    gradient: Tensor
    factor: float


@dataclass(frozen=True, eq=False)
class _MicroBatch:
    """Pairs of a sample and a trained call, of one term of the guided output."""

    branch: Branch
    parts: Sequence[tuple[_TrainedCall, slice]]

    def surrogate(self) -> Tensor:
        """Call the network; return a scalar whose gradient is that of the run."""
        latents = torch.cat([call.latents[rows] for call, rows in self.parts])
        cotangents = torch.cat(
            [
                call.factor * self.branch.weight(call.timestep) * call.gradient[rows]
                for call, rows in self.parts
            ]
        )
        owners = [(call.timestep, i) for call, r in self.parts for i in range(r.start, r.stop)]
        timesteps, rows = torch.tensor(owners, device=latents.device).unbind(1)
        with torch.enable_grad():
            output = self.branch.network(latents, timesteps, rows)
            require_trainable(output)
            return (output * cotangents).sum()


@dataclass(frozen=True, kw_only=True)
class ReplayEngine:
    """Run without gradient, score, and replay the trained steps one micro-batch at a time.

    Equal to `GraphEngine` where it applies, if the network's output is the same when called again
    (no dropout). Its memory does not depend on the number of steps, trained or not.

    Args:
        micro_batch_size: Pairs of a sample and a trained step in one call of the network; None is
            the number of samples. Terms of the guided output are called one after the other.
        loss_batch_size: Images that are decoded and scored at a time; None is all.

    Raises:
        ConfigError: If a size is below 1.
    """

    micro_batch_size: int | None = None
    loss_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(micro_batch_size=self.micro_batch_size, loss_batch_size=self.loss_batch_size)

    def run(
        self,
        chain: Chain,
        denoiser: GuidedDenoiser,
        noise: RolloutNoise,
        loss_of_latents: LossOfLatents,
        *,
        rollout: Denoiser | None = None,
        backward: Backward | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> GradientReport:
        """Sample, score and back-propagate: see ``GradientEngine``.

        With ``after_step``, a micro-batch has pairs of one step alone.
        """
        _check_replayable(chain.plan)
        branches = denoiser.branches()
        sampled = rollout or denoiser
        latents, inputs = _roll_out(chain, sampled, noise)
        losses, calls = self._score(chain, sampled, noise, loss_of_latents, latents, inputs)
        groups = _by_step(calls) if after_step else [calls]
        batches = [list(self._micro_batches(branches, group)) for group in groups]
        last = next(batch for group in reversed(batches) for batch in reversed(group))
        for group, micro_batches in zip(groups, batches, strict=True):
            for batch in micro_batches:
                (backward or default_backward)(batch.surrogate(), batch is last)
            if after_step:
                after_step(group[0].step_index)
        factors = {index: chain.weight * chain.factors[index] for index in inputs}
        return GradientReport(latents, losses[0], losses[1:], factors, inputs)

    def _score(
        self,
        chain: Chain,
        denoiser: Denoiser,
        noise: RolloutNoise,
        loss_of_latents: LossOfLatents,
        latents: Tensor,
        inputs: dict[int, Tensor],
    ) -> tuple[Tensor, list[_TrainedCall]]:
        """Differentiate the loss of the image, and of its re-noised copies.

        Returns:
            Losses ``(1 + n, B)``, and what is to be replayed.
        """
        rows = torch.arange(len(latents), device=latents.device)
        found, gradient = gradient_of_loss(loss_of_latents, latents, rows, self.loss_batch_size)
        losses, weight = [found], chain.image_weight
        timesteps, factors, step = chain.path.timesteps, chain.factors, chain.clean_step
        calls = [
            _TrainedCall(index, timesteps[index], seen, gradient, weight * factors[index])
            for index, seen in inputs.items()
        ]
        for copy in renoised(chain, latents, noise):
            with torch.no_grad():
                image = step.a * copy + step.b * denoiser(copy, step.timestep)
            found, gradient = gradient_of_loss(loss_of_latents, image, rows, self.loss_batch_size)
            losses.append(found)
            index = chain.plan.last_step
            calls.append(_TrainedCall(index, step.timestep, copy, gradient, weight * step.b))
        return torch.stack(losses), calls

    def _micro_batches(
        self, branches: Sequence[Branch], calls: Sequence[_TrainedCall]
    ) -> Iterator[_MicroBatch]:
        """Cut the pairs of all calls, row after row, term after term."""
        num_rows = len(calls[0].latents)
        size = self.micro_batch_size or num_rows
        for branch in branches:
            used = [call for call in calls if branch.weight(call.timestep)]
            for start in range(0, len(used) * num_rows, size):
                yield _MicroBatch(branch, list(_overlaps(used, num_rows, start, start + size)))


def _overlaps(
    calls: Sequence[_TrainedCall], num_rows: int, start: int, stop: int
) -> Iterator[tuple[_TrainedCall, slice]]:
    """Find the rows of each call that lie in a range of all pairs, call after call."""
    for i, call in enumerate(calls):
        first, last = max(start - i * num_rows, 0), min(stop - i * num_rows, num_rows)
        if first < last:
            yield call, slice(first, last)


def _roll_out(
    chain: Chain, denoiser: Denoiser, noise: RolloutNoise
) -> tuple[Tensor, dict[int, Tensor]]:
    """Sample without gradient.

    Returns:
        The clean latents, and what the network saw at each trained step, all ``(B, c, h, w)``.
    """
    inputs = {}
    # Never inference mode: its tensors cannot be replayed, and sharded weights refuse it.
    with torch.no_grad():
        walk = chain.walk(noise)
        for index, timestep in enumerate(chain.path.timesteps):
            if index in chain.plan.train_steps:
                inputs[index] = walk.latents
            walk.advance(denoiser(walk.latents, timestep))
    return walk.latents, inputs


def _by_step(calls: Sequence[_TrainedCall]) -> list[list[_TrainedCall]]:
    """Group calls by step."""
    steps = dict.fromkeys(call.step_index for call in calls)
    return [[call for call in calls if call.step_index == step] for step in steps]


def _check_replayable(plan: TruncationPlan) -> None:
    if not plan.replayable:
        raise ConfigError(
            f"expected detached inputs for the replay engine; got attached ones at the last "
            f"{len(plan.train_steps)} steps. Use `segalign.truncation.graph.GraphEngine`."
        )
