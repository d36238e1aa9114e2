"""Back-propagation through the recorded run.

Dims: B batch, M rows of a micro-batch, c/h/w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from segalign.diffusion.linear_steps import Denoiser
from segalign.truncation.chain import Chain
from segalign.truncation.denoiser import GuidedDenoiser
from segalign.truncation.engine import (
    Backward,
    GradientReport,
    LossOfLatents,
    check_sizes,
    default_backward,
    gradient_of_loss,
    renoised,
    require_trainable,
    row_chunks,
)
from segalign.truncation.noise import RolloutNoise, RowsOfNoise


@dataclass(frozen=True, kw_only=True)
class GraphEngine:
    """Record the run as the plan says and back-propagate: for every strategy.

    Its memory grows with the number of trained steps.

    Args:
        checkpoint: Keep each trained step's input alone and call the network again in the backward
            pass.
        micro_batch_size: Samples that run at a time; None is all.
        loss_batch_size: Images that are decoded and scored at a time; None is all.

    Raises:
        ConfigError: If a size is below 1.
    """

    checkpoint: bool = False
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

        ``rollout`` is for whole batches, and is not used with a ``micro_batch_size``.
        """
        initial = noise.initial()
        chunks = list(row_chunks(len(initial), self.micro_batch_size, initial.device))
        parts = []
        for chunk in chunks:
            run = _Recording(self, chain, denoiser, RowsOfNoise(noise, chunk), chunk)
            with torch.enable_grad():
                loss, report = run.record(loss_of_latents, rollout if len(chunks) == 1 else None)
            (backward or default_backward)(loss, chunk is chunks[-1])
            parts.append(report)
        return GradientReport(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.losses for part in parts]),
            torch.cat([part.renoised_losses for part in parts], dim=1),
            parts[0].factors,
            {i: torch.cat([part.inputs[i] for part in parts]) for i in parts[0].inputs},
        )


@dataclass(frozen=True, eq=False)
class _Recording:
    """The run of some samples."""

    engine: GraphEngine
    chain: Chain
    denoiser: GuidedDenoiser
    noise: RolloutNoise
    rows: Tensor

    def record(
        self, loss_of_latents: LossOfLatents, rollout: Denoiser | None
    ) -> tuple[Tensor, GradientReport]:
        """Run forward.

        Returns:
            A scalar with the gradient of the loss (its value has no meaning), and the report.
        """
        chain, plan = self.chain, self.chain.plan
        walk, inputs = chain.walk(self.noise), {}
        for index, timestep in enumerate(chain.path.timesteps):
            if index in plan.train_steps:
                inputs[index] = walk.latents.detach()
                seen = inputs[index] if plan.detach_input else walk.latents
                walk.advance(self._trained_output(seen, timestep))
            else:
                walk.advance(self._output(walk.latents, timestep, rollout))
        scored = [walk.latents]
        step = chain.clean_step
        scored += [
            step.a * copy + step.b * self._trained_output(copy, step.timestep)
            for copy in renoised(chain, walk.latents, self.noise)
        ]
        size = self.engine.loss_batch_size
        found = [gradient_of_loss(loss_of_latents, image, self.rows, size) for image in scored]
        loss = torch.stack(
            [(image * gradient).sum() for image, (_, gradient) in zip(scored, found, strict=True)]
        ).sum()
        losses = torch.stack([values for values, _ in found])
        report = GradientReport(
            walk.latents.detach(),
            losses[0],
            losses[1:],
            {index: chain.weight * chain.factors[index] for index in plan.train_steps},
            inputs,
        )
        return chain.image_weight * loss, report

    def _trained_output(self, latents: Tensor, timestep: int) -> Tensor:
        """Call the network with gradient."""
        arguments = latents, timestep, self.rows
        if self.engine.checkpoint:
            output: Tensor = checkpoint(self.denoiser, *arguments, use_reentrant=False)
        else:
            output = self.denoiser(*arguments)
        require_trainable(output)
        return output

    def _output(self, latents: Tensor, timestep: int, rollout: Denoiser | None) -> Tensor:
        """Call the network without gradient."""
        with torch.no_grad():
            if rollout is not None:
                return rollout(latents.detach(), timestep)
            return self.denoiser(latents.detach(), timestep, self.rows)
