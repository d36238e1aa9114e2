"""How fast reward fine-tuning steps are: images, FLOPs, and the share of the device's peak."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from segalign.diffusion.step_cost import StepCost, achieved
from segalign.reward_tuning.image_towers import image_towers
from segalign.reward_tuning.step import StepReport

if TYPE_CHECKING:
    from lightning_modules.reward_finetuning import RewardFineTuningModule


@dataclass(kw_only=True)
class StepSpeed:
    """Times steps, and knows what they cost.

    FLOPs are those that no implementation can leave out: neither recomputation nor unmerged
    adapters in the rollout are counted. Of rewards the image towers of CLIP models are.

    Attributes:
        module: The module whose steps are timed.
        cost: Its pieces.
        peak: FLOPs per second of the device at most; None where that is not known.
    """

    module: "RewardFineTuningModule"
    cost: StepCost
    peak: float | None
    _started: float = 0.0

    @classmethod
    def of(cls, module: "RewardFineTuningModule") -> Self:
        """Count the pieces of a module; nothing is computed."""
        generator = module.generator
        shape = generator.codec.latent_shape(generator.image_size, generator.image_size)
        conditioner = generator.conditioner
        cost = StepCost.measure(
            module.unet,
            shape,
            conditioner.token_budget,
            conditioner.width,
            decode=module.reward_step.decode,
            reward=image_towers(module.reward),
        )
        dtype = torch.bfloat16 if "bf16" in str(module.trainer.precision) else torch.float32
        return cls(
            module=module,
            cost=cost,
            peak=get_available_flops(module.device, dtype),
        )

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def figures(self, report: StepReport) -> dict[str, float]:
        """Relate a step's work to the time since its start.

        Args:
            report: What was done.

        Returns:
            ``images_per_second`` of all ranks; ``tflops_per_second`` of this rank, and ``mfu``
            where the device's peak is known.
        """
        seconds = time.perf_counter() - self._started
        num_samples = len(report.losses)
        flops = num_samples * self._flops(report)
        speed = achieved(flops, seconds, self.peak)
        figures = {
            "images_per_second": num_samples * self.module.trainer.world_size / seconds,
            "tflops_per_second": speed.tflops_per_second,
        }
        return figures if speed.mfu is None else figures | {"mfu": speed.mfu}

    def _flops(self, report: StepReport) -> float:
        step = self.module.reward_step
        return self.cost.for_plan(
            report.plan,
            step.settings.sampler.guidance,
            report.timesteps,
            step.generator.schedule.num_timesteps,
            merged=True,
            penalty=step.penalty is not None,
        )
