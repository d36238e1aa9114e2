"""Stage 1: supervised fine-tuning of a text-to-image model on long captions."""

from collections.abc import Sequence

from jsonargparse.typing import NonNegativeInt, PositiveFloat
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from typing_extensions import override

from lightning_modules.generator_module import GeneratorModule
from segalign.diffusion.bundle import BundleSource
from segalign.diffusion.latent_cache import LatentCache
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.scheduler_sampler import SchedulerSampler
from segalign.losses.denoising_objective import DenoisingObjective
from segalign.text.conditioning import TextConditioning
from segalign.text.settings import TextEncoding
from segalign.types import CaptionBatch


class LongTextDiffusionModule(GeneratorModule):
    """Train a denoising network to follow captions of any length.

    Timesteps and noise are functions of (seed, optimizer step, epoch, sample id).

    Args:
        base: Where the model comes from.
        text: How captions are encoded.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; null keeps the rate constant.
        lora: Train low-rank adapters; null trains the whole network.
        train_text_model: Also train the text model.
        sampler: How images are generated for evaluation; with `scheduler`, by one of diffusers.
        seed: Seeds timesteps and noise.
        eval_seed: Seeds the noise of validation and prediction.
        min_snr_gamma: Bound of the loss weights; null weighs all timesteps alike.
        timestep_shift: Above 1, noisy timesteps are drawn more often; small images need it, since
            they show their content until late.
        latent_cache_megabytes: Memory for latents of the training images; 0 encodes them anew.
    """

    def __init__(
        self,
        base: BundleSource,
        optimizer: OptimizerCallable,
        text: TextEncoding = TextEncoding(),  # noqa: B008
        lr_scheduler: LRSchedulerCallable | None = None,
        lora: LoraSettings | None = None,
        train_text_model: bool = False,
        sampler: DDIMSampler | SchedulerSampler = DDIMSampler(),  # noqa: B008
        seed: int = 0,
        eval_seed: int = 1234,
        min_snr_gamma: float | None = None,
        timestep_shift: PositiveFloat = 1.0,
        latent_cache_megabytes: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            base,
            optimizer,
            lr_scheduler,
            text=text,
            lora=lora,
            train_text_model=train_text_model,
            sampler=sampler,
            eval_seed=eval_seed,
        )
        self.seed = seed
        self.min_snr_gamma = min_snr_gamma
        self.timestep_shift = timestep_shift
        self.latent_cache = LatentCache(latent_cache_megabytes * 2**20)

    @override
    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        latents = self._latents(batch)
        counters = [
            (self.global_step, epoch, sample_id)
            for epoch, sample_id in zip(
                batch["epochs"].tolist(), batch["sample_ids"].tolist(), strict=True
            )
        ]
        text = self.generator.conditioner(batch["captions"])
        self.report_text(text.report, batch)
        losses = self._losses(self.seed, latents, text, counters)
        loss = self.reduce_losses(losses, batch)
        self.log_train("loss", loss.detach(), batch)
        return loss

    @override
    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        self._log_loss("val", batch)

    @override
    def test_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        if "images" in batch:
            self._log_loss("test", batch)

    def _log_loss(self, stage: str, batch: CaptionBatch) -> None:
        """Log the denoising loss on timesteps and noise that depend on the sample alone."""
        counters = [(sample_id,) for sample_id in batch["sample_ids"].tolist()]
        text = self.generator.conditioner(batch["captions"])
        losses = self._losses(self.eval_seed, self.codec.encode(batch["images"]), text, counters)
        valid = batch["valid"]
        self.log(
            f"{stage}/loss",
            losses[valid].mean() if valid.any() else losses.sum() * 0,
            batch_size=int(valid.sum()),
            sync_dist=True,
        )

    def _latents(self, batch: CaptionBatch) -> Tensor:
        return self.latent_cache.encode(
            self.codec, batch["images"], batch["sample_ids"].tolist(), batch["valid"].tolist()
        )

    def _losses(
        self,
        seed: int,
        latents: Tensor,
        text: TextConditioning,
        counters: Sequence[tuple[int, ...]],
    ) -> Tensor:
        """Compute the denoising loss of each sample, ``(B,)``."""
        objective = DenoisingObjective(
            seed=seed, min_snr_gamma=self.min_snr_gamma, timestep_shift=self.timestep_shift
        )
        generator = self.generator
        return objective.losses(generator.predict, generator.schedule, latents, text, counters)
