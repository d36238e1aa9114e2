"""Stage 2: reward fine-tuning of a text-to-image model through its own sampler."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_modules import manual_steps, reward_checks
from lightning_modules.reward_figures import gradient_figures, step_means
from lightning_modules.scored_generator_module import ScoredGeneratorModule
from lightning_modules.step_speed import StepSpeed, count_step
from segalign.diffusion.bundle import BundleSource
from segalign.diffusion.clipped_sampler import ClippedSampler
from segalign.diffusion.generator import TextToImage
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.rollout import RolloutSettings
from segalign.diffusion.sampler import DDIMSampler, EulerSampler
from segalign.diffusion.scheduler_sampler import SchedulerSampler
from segalign.diffusion.tiny_decoder import TinyDecoder
from segalign.gradients import average_gradients
from segalign.losses.denoising_objective import DenoisingObjective
from segalign.ranks import together
from segalign.reward_tuning.denoising import denoising_gradient
from segalign.reward_tuning.lora_norm import lora_norm
from segalign.reward_tuning.settings import (
    EngineName,
    PenaltySettings,
    RewardStepSettings,
    StepMemory,
    check_penalty,
)
from segalign.reward_tuning.step import RewardStep, StepReport
from segalign.rewards.direction_state import direction_state, load_direction_state
from segalign.rewards.latent_loss import RewardObjective, Saturated
from segalign.rewards.protocol import RewardSource, check_reward_names
from segalign.sharding import shard_backbone
from segalign.text.conditioning import TextConditioning
from segalign.text.settings import TextEncoding
from segalign.trainable import trainable_parameters
from segalign.truncation.drtune import DRTune
from segalign.truncation.plan import TruncationStrategy
from segalign.truncation.step_norms import StepGradientNorms
from segalign.types import CaptionBatch

_DIRECTIONS = "common_directions"


class RewardFineTuningModule(ScoredGeneratorModule):
    """Tune a generator so that a reward likes what it samples, and only some steps are trained.

    Needs captions alone. A training batch is one optimizer step, whatever is computed at a time.
    Trained steps are a function of (seed, optimizer step), noise also of the sample id.

    Args:
        base: Where the model comes from.
        reward: What is maximised.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; null keeps the rate constant.
        text: How captions are encoded; text models stay frozen.
        lora: Train low-rank adapters; null trains the whole network.
        strategy: Which sampling steps are trained; null is DRTune with 5 of them.
        rollout_sampler: How images are sampled for training.
        sampler: How images are generated for evaluation.
        objective: From rewards to losses: scale, hinge.
        saturated: Gradient of pixels outside [0, 1]: ``zero``, or ``pass`` as if not clamped.
        penalty: Keep trained outputs near those of the start; null does not.
        diffusion_weight: Factor of the denoising loss on the data's images, which it alone needs
            (``data.content: image``); 0 leaves them unread.
        diffusion_loss: Settings of that loss.
        max_grad_norm: Longest gradient; longer ones are scaled down. Null does not.
        engine: ``auto`` replays trained steps wherever that is exact; ``graph`` records the run.
        memory: What is computed at a time.
        rollout: Merged adapters, cached text and compilation of the steps without gradient.
        decoder: A small decoder to train through, whose gradient is biased; null is the model's.
        held_out: Rewards by name that are only watched, never trained on.
        seed: Seeds trained steps, noise and the denoising loss.
        eval_seed: Seeds the noise of evaluation.
    """

    def __init__(
        self,
        base: BundleSource,
        reward: RewardSource,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        text: TextEncoding = TextEncoding(),  # noqa: B008
        lora: LoraSettings | None = None,
        strategy: TruncationStrategy | None = None,
        rollout_sampler: DDIMSampler | EulerSampler | SchedulerSampler | ClippedSampler = (
            DDIMSampler(num_inference_steps=50)  # noqa: B008
        ),
        sampler: DDIMSampler | SchedulerSampler = DDIMSampler(),  # noqa: B008
        objective: RewardObjective = RewardObjective(),  # noqa: B008
        saturated: Saturated = "zero",
        penalty: PenaltySettings | None = None,
        diffusion_weight: NonNegativeFloat = 0.0,
        diffusion_loss: DenoisingObjective = DenoisingObjective(),  # noqa: B008
        max_grad_norm: PositiveFloat | None = 1.0,
        engine: EngineName = "auto",
        memory: StepMemory = StepMemory(),  # noqa: B008
        rollout: RolloutSettings = RolloutSettings(),  # noqa: B008
        decoder: TinyDecoder | None = None,
        held_out: dict[str, RewardSource] | None = None,
        seed: int = 0,
        eval_seed: int = 1234,
    ) -> None:
        super().__init__(
            base,
            optimizer,
            lr_scheduler,
            text=text,
            lora=lora,
            train_text_model=False,
            sampler=sampler,
            eval_seed=eval_seed,
        )
        # Several backward passes make one gradient, so that this module steps its optimizer itself.
        self.automatic_optimization = False
        self.step_settings = RewardStepSettings(
            strategy=strategy or DRTune(),
            sampler=rollout_sampler,
            objective=objective,
            engine=engine,
            memory=memory,
            rollout=rollout,
            saturated=saturated,
        )
        self.reward_source = reward
        self.held_out_sources = held_out or {}
        check_reward_names(self.held_out_sources, "in `held_out`")
        self.decoder_source = decoder
        check_penalty(penalty, self.step_settings)
        self.penalty = penalty
        self.diffusion_weight = diffusion_weight
        self.diffusion_loss = diffusion_loss
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.reference: TextToImage | None = None
        self._report: StepReport | None = None
        self._batch: CaptionBatch | None = None

    @override
    def configure_objective(self) -> None:
        reward_checks.check_trained(trainable_parameters(self))
        self.load_rewards(self.reward_source, self.held_out_sources)
        self.decoder = None if self.decoder_source is None else self.decoder_source.load()
        if self.penalty is not None and self.lora is None:
            self.reference = self.generator.frozen_copy()
            self.reference_unet = self.reference.unet
        self.reward_step = RewardStep(
            self.generator,
            self.reward,
            self.step_settings,
            seed=self.seed,
            decode=None if self.decoder is None else self.decoder.decode,
            penalty=self.penalty,
            reference=self.reference,
        )
        # Calls of sharded weights cannot be counted any more.
        self.step_cost = None if self.device_mesh is None else count_step(self)

    @override
    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the denoising network, and its frozen copy where there is one."""
        super().shard(mesh)
        if self.reference is not None:
            shard_backbone(self.reference.unet, mesh)

    @override
    def train(self, mode: bool = True) -> Self:
        """Switch modes; in training, a moving average of the common direction learns."""
        super().train(mode)
        if isinstance(reward := getattr(self, "reward", None), nn.Module):
            reward.train(mode)
        return self

    @override
    def configure_callbacks(self) -> list[Any]:
        """Refuse settings of the trainer that this module cannot follow, before Lightning does."""
        reward_checks.check_trainer(self.trainer)
        return super().configure_callbacks()

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        reward_checks.check_data(self.trainer, self.reward, wants_images=self.diffusion_weight > 0)
        self.speed = StepSpeed.of(self)

    @override
    def training_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        self.speed.start()
        directions = direction_state(self.reward)  # which sampling moves, before all is known
        manual_steps.the_optimizer(self).zero_grad()
        trained = list(trainable_parameters(self).values())
        with manual_steps.local_backward(self.trainer.strategy):
            text = self._read(batch)
            denoising = self._denoising_losses(batch, text)
            norms = StepGradientNorms(trained) if manual_steps.is_logging(self) else None
            report = self.reward_step.run(
                batch,
                text,
                self.global_step,
                backward=self._backward,
                observer=norms,
                compare_decoders=norms is not None,
            )
        average_gradients(trained)
        self._report = report
        self._batch = batch
        # Blank captions are seen by all ranks now, lest the others wait for this one.
        losses = reward_checks.without_blank(len(report.totals) * report.totals + denoising, batch)
        self.reduce_losses(losses, batch)
        self.finish_reduction()
        if self.is_left_out:
            load_direction_state(self.reward, directions)
        norm = manual_steps.step_optimizer(self, trained, self.max_grad_norm)
        self.speed.stop(report)
        if norms is not None:
            extra = {"denoising_loss": denoising.mean()} if self.diffusion_weight else {}
            self._log_step(report, batch, {**gradient_figures(report, norm, norms), **extra})

    def _read(self, batch: CaptionBatch) -> TextConditioning:
        with torch.no_grad():
            text = self.generator.conditioner(batch["captions"])
        self.report_text(text.report, batch)
        return text

    def _backward(self, loss: Tensor, _is_last: bool) -> None:
        self.manual_backward(loss)

    def _denoising_losses(self, batch: CaptionBatch, text: TextConditioning) -> Tensor:
        """Add the gradient of the denoising loss on the data's images; return it, ``(B,)``."""
        if not self.diffusion_weight:
            return torch.zeros(len(batch["valid"]), device=self.device)
        return denoising_gradient(
            self.generator,
            self.diffusion_loss,
            batch,
            text,
            self.global_step,
            weight=self.diffusion_weight,
            batch_size=self.step_settings.memory.rollout_batch_size,
            backward=self._backward,
        )

    @override
    def refuse_batch(self) -> None:
        """Refuse blank captions of any rank, on all ranks.

        Raises:
            DataError: If there are some.
        """
        together(self._refuse_blank_captions)

    def _refuse_blank_captions(self) -> None:
        found = None if self._batch is None else reward_checks.blank_captions_error(self._batch)
        if found is not None:
            raise found

    @override
    def what_failed(self) -> str:
        return (None if self._report is None else self._report.non_finite()) or ""

    def _log_step(
        self, report: StepReport, batch: CaptionBatch, figures: Mapping[str, Tensor | float]
    ) -> None:
        """Log a step; every rank comes here at the same ones."""
        moved = lora_norm(self.unet)
        figures = {
            **step_means(report, batch["valid"], self.trainer.strategy),
            **figures,
            **self.speed.figures(),
            **({} if moved is None else {"lora_norm": moved}),
        }
        for name, value in figures.items():
            shown = name in ("loss", "reward_mean")
            self.log(f"train/{name}", value, prog_bar=shown, batch_size=len(batch["valid"]))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_DIRECTIONS] = direction_state(self.reward)

    @override
    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        load_direction_state(self.reward, checkpoint.get(_DIRECTIONS, {}))
