"""Back-propagation through the recorded run.

Dims: B batch, M rows of a micro-batch, c/h/w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from segalign.truncation.chain import Chain, Walk
from segalign.truncation.denoiser import GuidedDenoiser
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
    row_ranges,
)
from segalign.truncation.noise import RolloutNoise, select_rows
from segalign.truncation.penalty import OutputPenalty, check_penalties


@dataclass(frozen=True, kw_only=True)
class GraphEngine:
    """Record the run as the plan says and back-propagate: for every strategy.

    Its memory grows with the number of trained steps.

    Args:
        checkpoint: Keep each trained step's input alone and call the network again in the backward
            pass.
        micro_batch_size: Samples that run at a time; None is all.
        loss_batch_size: Images that are decoded and scored at a time; None is all.
        check_finite: Whether numbers that are not finite are refused.

    Raises:
        ConfigError: If a size is below 1.
    """

    checkpoint: bool = False
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

        ``rollout`` is for whole batches, and is not used with a ``micro_batch_size``. A penalty of
        steps whose inputs are attached needs one more call of the network at each.
        """
        initial = noise.initial()
        chunks = list(row_ranges(len(initial), self.micro_batch_size))
        if rollout is not None and (len(chunks) > 1 or not _untrained(chain)):
            rollout.release()
            rollout = None
        parts = []
        for chunk in chunks:
            rows = torch.arange(chunk.start, chunk.stop, device=initial.device)
            run = _Recording(self, chain, denoiser, select_rows(noise, chunk), rows, penalty)
            with torch.enable_grad():
                loss, report = run.record(loss_of_latents, rollout)
            (backward or default_backward)(loss, chunk is chunks[-1])
            parts.append(report)
        return GradientReport(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.losses for part in parts]),
            torch.cat([part.renoised_losses for part in parts], dim=1),
            parts[0].factors,
            {i: torch.cat([part.inputs[i] for part in parts]) for i in parts[0].inputs},
            torch.cat([part.penalties for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class _Recording:
    """The run of some samples."""

    engine: GraphEngine
    chain: Chain
    denoiser: GuidedDenoiser
    noise: RolloutNoise
    rows: Tensor
    penalty: OutputPenalty | None

    def record(
        self, loss_of_latents: LossOfLatents, rollout: RolloutNetwork | None
    ) -> tuple[Tensor, GradientReport]:
        """Run forward.

        Returns:
            A scalar with the gradient of the loss (its value has no meaning), and the report.
        """
        chain = self.chain
        walk, inputs, penalties = self._walk(rollout)
        scored = [walk.latents]
        scored += [
            chain.clean(copy, self._trained_outputs(copy, chain.clean_step.timestep)[0])
            for copy in renoised(chain, walk.latents, self.noise)
        ]
        found = [self._score(loss_of_latents, image) for image in scored]
        loss = torch.stack(
            [(image * gradient).sum() for image, (_, gradient) in zip(scored, found, strict=True)]
        ).sum()
        losses = torch.stack([values for values, _ in found])
        total = losses.new_zeros(len(self.rows))
        for values in penalties:
            total += values.detach().to(total)
        if self.engine.check_finite:
            require_finite("penalties", total)
        report = GradientReport(
            walk.latents.detach(), losses[0], losses[1:], chain.trained_factors, inputs, total
        )
        surrogate = chain.image_weight * loss
        for values in penalties:
            surrogate = surrogate + values.sum()
        return surrogate, report

    def _walk(self, rollout: RolloutNetwork | None) -> tuple[Walk, dict[int, Tensor], list[Tensor]]:
        """Take all steps; return also what trained ones saw, and their penalties ``(M,)``."""
        plan, penalties, untrained = self.chain.plan, [], _untrained(self.chain)
        walk, inputs = self.chain.walk(self.noise), {}
        for index, timestep in enumerate(self.chain.timesteps):
            if index in untrained:
                walk.advance(self._output(walk.latents, timestep, rollout))
                if rollout is not None and index == untrained[-1]:
                    rollout.release()
                continue
            inputs[index] = walk.latents.detach()
            seen = inputs[index] if plan.detach_input else walk.latents
            output, conditional = self._trained_outputs(seen, timestep)
            walk.advance(output)
            if self.penalty is not None:
                penalties.append(self._penalties(self.penalty, conditional, seen, timestep))
        return walk, inputs, penalties

    def _score(self, loss_of_latents: LossOfLatents, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiate the loss of clean latents."""
        size, check = self.engine.loss_batch_size, self.engine.check_finite
        return gradient_of_loss(loss_of_latents, latents, self.rows, size, check_finite=check)

    def _penalties(
        self, penalty: OutputPenalty, conditional: Tensor, seen: Tensor, timestep: int
    ) -> Tensor:
        """Penalise a trained step, ``(M,)``; its gradient ends at the step's input."""
        timesteps = torch.full((len(seen),), timestep, device=seen.device)
        if seen.requires_grad:
            conditional = self._recorded(
                self.denoiser.conditional, seen.detach(), timesteps, self.rows
            )
        values = penalty(conditional, seen.detach(), timesteps, self.rows)
        check_penalties(values, len(seen))
        return values

    def _trained_outputs(self, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Call the network with gradient; return the guided output and the conditional one."""
        output, conditional = self._recorded(self.denoiser.outputs, latents, timestep, self.rows)
        require_trainable(output)
        return output, conditional

    def _recorded(self, network: Callable[..., Any], *arguments: Any) -> Any:
        """Call the network, keeping what the backward pass needs, or the input alone."""
        if self.engine.checkpoint:
            return checkpoint(network, *arguments, use_reentrant=False)
        return network(*arguments)

    def _output(self, latents: Tensor, timestep: int, rollout: RolloutNetwork | None) -> Tensor:
        """Call the network without gradient."""
        with torch.no_grad():
            if rollout is not None:
                return rollout(latents.detach(), timestep)
            return self.denoiser(latents.detach(), timestep, self.rows)


def _untrained(chain: Chain) -> list[int]:
    """List the steps that run without gradient."""
    return [index for index in range(len(chain.timesteps)) if index not in chain.plan.train_steps]
