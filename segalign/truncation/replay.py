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
    require_finite,
    require_trainable,
)
from segalign.truncation.noise import RolloutNoise
from segalign.truncation.penalty import OutputPenalty, check_penalties


@dataclass(frozen=True, eq=False)
class _TrainedCall:
    """One call of the network that is trained, for the whole batch."""

    step_index: int
    timestep: int
    latents: Tensor
    gradient: Tensor
    factor: float
    is_copy: bool = False


@dataclass(frozen=True, eq=False)
class _MicroBatch:
    """Pairs of a sample and a trained call, of one term of the guided output."""

    branch: Branch
    parts: Sequence[tuple[_TrainedCall, slice]]
    penalty: OutputPenalty | None

    def surrogate(self, penalties: Tensor) -> Tensor:
        """Call the network; return a scalar whose gradient is that of the run.

        Args:
            penalties: ``(B,)``; those of the pairs are added to it.
        """
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
            scalar = (output * cotangents).sum()
            if self.penalty is None or not (kept := self._penalised()):
                return scalar
            if len(kept) < len(output):
                chosen = torch.tensor(kept, device=latents.device)
                output, latents = output[chosen], latents[chosen]
                timesteps, rows = timesteps[chosen], rows[chosen]
            values = self.penalty(output, latents, timesteps, rows)
            check_penalties(values, len(output))
        penalties.index_add_(0, rows, values.detach().to(penalties))
        return scalar + values.sum()

    def _penalised(self) -> list[int]:
        """Return the positions of pairs that are of the run itself, not of a re-noised copy."""
        copies = [call.is_copy for call, rows in self.parts for _ in range(rows.start, rows.stop)]
        return [position for position, is_copy in enumerate(copies) if not is_copy]


@dataclass(frozen=True, kw_only=True)
class ReplayEngine:
    """Run without gradient, score, and replay the trained steps one micro-batch at a time.

    Equal to `GraphEngine` where it applies, if the network's output is the same when called again
    (no dropout). Its memory does not depend on the number of steps, trained or not.

    Args:
        micro_batch_size: Pairs of a sample and a trained step in one call of the network; None is
            the number of samples. Terms of the guided output are called one after the other.
        loss_batch_size: Images that are decoded and scored at a time; None is all.
        check_finite: Whether numbers that are not finite are refused.

    Raises:
        ConfigError: If a size is below 1.
    """

    micro_batch_size: int | None = None
    loss_batch_size: int | None = None
    check_finite: bool = True

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
        penalty: OutputPenalty | None = None,
    ) -> GradientReport:
        """Sample, score and back-propagate: see ``GradientEngine``.

        With ``after_step``, a micro-batch has pairs of one step alone.
        """
        _check_replayable(chain)
        branches = denoiser.branches()
        sampled = rollout or denoiser
        latents, inputs = _roll_out(chain, sampled, noise)
        losses, calls = self._score(chain, sampled, noise, loss_of_latents, latents, inputs)
        groups = _by_step(calls) if after_step else [calls]
        batches = [list(self._micro_batches(branches, group, penalty)) for group in groups]
        penalties = torch.zeros_like(losses[0])
        last = next(batch for group in reversed(batches) for batch in reversed(group))
        for group, micro_batches in zip(groups, batches, strict=True):
            for batch in micro_batches:
                (backward or default_backward)(batch.surrogate(penalties), batch is last)
            if after_step:
                after_step(group[0].step_index)
        if self.check_finite:
            require_finite("penalties", penalties)
        return GradientReport(
            latents, losses[0], losses[1:], chain.trained_factors, inputs, penalties
        )

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
        found, gradient = self._differentiate(loss_of_latents, latents)
        losses, weight = [found], chain.image_weight
        timesteps, factors, step = chain.timesteps, chain.factors, chain.clean_step
        calls = [
            _TrainedCall(index, timesteps[index], seen, gradient, weight * factors[index])
            for index, seen in inputs.items()
        ]
        for copy in renoised(chain, latents, noise):
            with torch.no_grad():
                image = chain.clean(copy, denoiser(copy, step.timestep))
            found, gradient = self._differentiate(loss_of_latents, image)
            losses.append(found)
            index = chain.plan.last_step
            factor = weight * step.b
            calls.append(_TrainedCall(index, step.timestep, copy, gradient, factor, is_copy=True))
        return torch.stack(losses), calls

    def _differentiate(
        self, loss_of_latents: LossOfLatents, latents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return losses ``(B,)`` and their gradient."""
        rows = torch.arange(len(latents), device=latents.device)
        return gradient_of_loss(
            loss_of_latents, latents, rows, self.loss_batch_size, check_finite=self.check_finite
        )

    def _micro_batches(
        self,
        branches: Sequence[Branch],
        calls: Sequence[_TrainedCall],
        penalty: OutputPenalty | None,
    ) -> Iterator[_MicroBatch]:
        """Cut the pairs of all calls, row after row, term after term; the first is penalised."""
        num_rows = len(calls[0].latents)
        size = self.micro_batch_size or num_rows
        for branch in branches:
            own = penalty if branch is branches[0] else None
            used = [call for call in calls if own or branch.weight(call.timestep)]
            for start in range(0, len(used) * num_rows, size):
                parts = list(_overlaps(used, num_rows, start, start + size))
                yield _MicroBatch(branch, parts, own)


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
        for index, timestep in enumerate(chain.timesteps):
            if index in chain.plan.train_steps:
                inputs[index] = walk.latents
            walk.advance(denoiser(walk.latents, timestep))
    return walk.latents, inputs


def _by_step(calls: Sequence[_TrainedCall]) -> list[list[_TrainedCall]]:
    """Group calls by step."""
    steps = dict.fromkeys(call.step_index for call in calls)
    return [[call for call in calls if call.step_index == step] for step in steps]


def _check_replayable(chain: Chain) -> None:
    plan = chain.plan
    if chain.clipped is not None:
        raise ConfigError(
            "expected a sampler that is linear in the outputs for the replay engine; got one that "
            "clips. Use `segalign.truncation.graph.GraphEngine`, or a sampler that does not clip."
        )
    if not plan.replayable:
        raise ConfigError(
            f"expected detached inputs for the replay engine; got attached ones at the last "
            f"{len(plan.train_steps)} steps. Use `segalign.truncation.graph.GraphEngine`."
        )
