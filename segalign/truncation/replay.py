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
    RolloutNetwork,
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
        timesteps, rows = self._owners(latents.device)
        with torch.enable_grad():
            output = self.branch.network(latents, timesteps, rows)
            require_trainable(output)
            scalar = (output * cotangents).sum()
            # Pairs of re-noised copies come last, and are not penalised.
            own = sum(rows.stop - rows.start for call, rows in self.parts if not call.is_copy)
            if self.penalty is None or not own:
                return scalar
            values = self.penalty(output[:own], latents[:own], timesteps[:own], rows[:own])
            check_penalties(values, own)
        penalties.index_add_(0, rows[:own], values.detach().to(penalties))
        return scalar + values.sum()

    def _owners(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Make the timestep and the row of each pair on the device, without waiting for it."""
        timesteps = [
            torch.full((rows.stop - rows.start,), call.timestep, device=device)
            for call, rows in self.parts
        ]
        rows = [torch.arange(rows.start, rows.stop, device=device) for _, rows in self.parts]
        return torch.cat(timesteps), torch.cat(rows)


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
        rollout: RolloutNetwork | None = None,
        backward: Backward | None = None,
        after_step: Callable[[int], None] | None = None,
        penalty: OutputPenalty | None = None,
    ) -> GradientReport:
        """Sample, score and back-propagate: see ``GradientEngine``.

        With ``after_step``, a micro-batch has pairs of one step alone.
        """
        _check_replayable(chain)
        branches = denoiser.branches()
        sampled = _roll_out(chain, denoiser if rollout is None else rollout, noise)
        if rollout is not None:
            rollout.release()
        losses, calls = self._score(chain, loss_of_latents, sampled)
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
            sampled.latents,
            losses[0],
            losses[1:],
            chain.trained_factors,
            sampled.inputs,
            penalties,
        )

    def _score(
        self, chain: Chain, loss_of_latents: LossOfLatents, sampled: "_Sampled"
    ) -> tuple[Tensor, list[_TrainedCall]]:
        """Differentiate the loss of the image, and of its re-noised copies.

        Returns:
            Losses ``(1 + n, B)``, and what is to be replayed; calls of copies come last.
        """
        found, gradient = self._differentiate(loss_of_latents, sampled.latents)
        losses, weight = [found], chain.image_weight
        timesteps, factors, step = chain.timesteps, chain.factors, chain.clean_step
        calls = [
            _TrainedCall(index, timesteps[index], seen, gradient, weight * factors[index])
            for index, seen in sampled.inputs.items()
        ]
        for copy, image in sampled.copies:
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


@dataclass(frozen=True, eq=False)
class _Sampled:
    """What a run without gradient leaves; all ``(B, c, h, w)``.

    Attributes:
        latents: The clean latents.
        inputs: What the network saw at each trained step.
        copies: Of each re-noised copy, what the network saw and its clean latents.
    """

    latents: Tensor
    inputs: dict[int, Tensor]
    copies: list[tuple[Tensor, Tensor]]


def _roll_out(chain: Chain, denoiser: Denoiser, noise: RolloutNoise) -> _Sampled:
    """Sample without gradient; copies too, so that nothing later calls the lean network."""
    inputs, last = {}, chain.clean_step.timestep
    # Never inference mode: its tensors cannot be replayed, and sharded weights refuse it.
    with torch.no_grad():
        walk = chain.walk(noise)
        for index, timestep in enumerate(chain.timesteps):
            if index in chain.plan.train_steps:
                inputs[index] = walk.latents
            walk.advance(denoiser(walk.latents, timestep))
        copies = [
            (copy, chain.clean(copy, denoiser(copy, last)))
            for copy in renoised(chain, walk.latents, noise)
        ]
    return _Sampled(walk.latents, inputs, copies)


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
