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

    Figures are means over the steps since the last ones, so that what is measured at a logged step
    weighs little. Waiting for data is left out, and so is the denoising loss.

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
    _seconds: float = 0.0
    _flops: float = 0.0
    _num_samples: int = 0

    @classmethod
    def of(cls, module: "RewardFineTuningModule") -> Self:
        """Count the pieces of a module, unless it has done so; nothing is computed."""
        cost = module.step_cost or count_step(module)
        is_half = "bf16" in str(module.trainer.precision) or module.unet.dtype == torch.bfloat16
        dtype = torch.bfloat16 if is_half else torch.float32
        return cls(module=module, cost=cost, peak=get_available_flops(module.device, dtype))

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def stop(self, report: StepReport) -> None:
        """Stop the clock, and add up what was done."""
        self._seconds += time.perf_counter() - self._started
        self._num_samples += len(report.losses)
        self._flops += len(report.losses) * self._flops_per_sample(report)

    def figures(self) -> dict[str, float]:
        """Relate the work of the steps since the last figures to their time.

        Returns:
            ``images_per_second`` of all ranks; ``tflops_per_second`` of this rank, and ``mfu``
            where the device's peak is known.
        """
        speed = achieved(self._flops, self._seconds, self.peak)
        num_images = self._num_samples * self.module.trainer.world_size
        figures = {
            "images_per_second": num_images / self._seconds,
            "tflops_per_second": speed.tflops_per_second,
        }
        self._seconds, self._flops, self._num_samples = 0.0, 0.0, 0
        return figures if speed.mfu is None else figures | {"mfu": speed.mfu}

    def _flops_per_sample(self, report: StepReport) -> float:
        step = self.module.reward_step
        return self.cost.for_plan(
            report.plan,
            step.settings.sampler.guidance,
            report.timesteps,
            step.generator.schedule.num_timesteps,
            merged=True,
            penalty=step.penalty is not None,
        )


def count_step(module: "RewardFineTuningModule") -> StepCost:
    """Count the pieces of a module whose weights are whole."""
    generator, conditioner = module.generator, module.generator.conditioner
    return StepCost.measure(
        module.unet,
        generator.codec.latent_shape(generator.image_size, generator.image_size),
        conditioner.token_budget,
        conditioner.width,
        decode=module.reward_step.decode,
        reward=image_towers(module.reward),
    )
