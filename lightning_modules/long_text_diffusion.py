"""Stage 1: supervised fine-tuning of a text-to-image model on long captions."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.training import TrainingModule
from segalign.diffusion.bundle import BundleSource
from segalign.diffusion.generator import TextToImage, Weights, evaluation_mode
from segalign.diffusion.latent_cache import LatentCache
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.sampler import DDIMSampler
from segalign.diffusion.scheduler_sampler import SchedulerSampler
from segalign.losses.diffusion import denoising_loss, min_snr_weights
from segalign.rng import counter_normal, counter_uniform
from segalign.text.conditioning import TextConditioning
from segalign.text.settings import TextEncoding
from segalign.types import CaptionBatch


class LongTextDiffusionModule(TrainingModule):
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
        super().__init__(optimizer, lr_scheduler)
        self.base = base
        self.text = text
        self.lora = lora
        self.train_text_model = train_text_model
        self.sampler = sampler
        self.seed = seed
        self.eval_seed = eval_seed
        self.min_snr_gamma = min_snr_gamma
        self.timestep_shift = timestep_shift
        self.latent_cache = LatentCache(latent_cache_megabytes * 2**20)

    @override
    def configure_model(self) -> None:
        if hasattr(self, "unet"):
            return
        bundle = self.base.load()
        self.unet = bundle.unet
        if self.lora is not None:
            self.lora.add_to(bundle.unet)
        width = int(bundle.unet.config.cross_attention_dim)
        self.text_models = self.text.complete(bundle.text_models, width)
        for text_model in (self.text_models.text_model, self.text_models.text_model_2):
            if text_model is not None:
                text_model.requires_grad_(self.train_text_model)
        self.conditioner = self.text.build(self.text_models)
        if isinstance(bundle.codec, nn.Module):
            bundle.codec.requires_grad_(False)
        self.codec = bundle.codec
        self.generator = TextToImage(
            self.unet,
            self.conditioner,
            self.codec,
            bundle.schedule,
            image_size=bundle.image_size,
            mask_padding=self.text.mask_padding,
        )
        self.check_trained_precision()
        self.train()

    @override
    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        latents = self._latents(batch)
        counters = [
            (self.seed, self.global_step, epoch, sample_id)
            for epoch, sample_id in zip(
                batch["epochs"].tolist(), batch["sample_ids"].tolist(), strict=True
            )
        ]
        text = self.generator.conditioner(batch["captions"])
        self.report_text(text.report, batch)
        losses = self._losses(latents, text, counters)
        loss = self.reduce_losses(losses, batch)
        self.log_train("loss", loss.detach(), batch)
        return loss

    @override
    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        counters = [(self.eval_seed, sample_id) for sample_id in batch["sample_ids"].tolist()]
        text = self.generator.conditioner(batch["captions"])
        losses = self._losses(self.codec.encode(batch["images"]), text, counters)
        valid = batch["valid"]
        self.log(
            "val/loss",
            losses[valid].mean() if valid.any() else losses.sum() * 0,
            batch_size=int(valid.sum()),
            sync_dist=True,
        )

    @override
    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        weights: Weights = "raw" if self.ema is None else "ema"
        sample_ids = batch["sample_ids"].tolist()
        return self.generate(batch["captions"], sample_ids, self.eval_seed, weights)

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make images in [0, 1], ``(B, 3, H, W)``: see ``ImageGenerator``."""
        noise = self.generator.noise(sample_ids, eval_seed).to(self.device)
        with evaluation_mode(self), self.weights(weights):
            return self.generator.sample(captions, noise, self.sampler)

    @contextlib.contextmanager
    def text_encoding(self, text: TextEncoding) -> Iterator[None]:
        """Encode captions in another way for the duration of a block, with the same weights."""
        own, generator = self.text, self.generator
        conditioner = text.build(self.text_models)
        try:
            self.text = text
            self.generator = generator.with_text(conditioner, mask_padding=text.mask_padding)
            yield
        finally:
            self.text, self.generator = own, generator

    def _latents(self, batch: CaptionBatch) -> Tensor:
        return self.latent_cache.encode(
            self.codec, batch["images"], batch["sample_ids"].tolist(), batch["valid"].tolist()
        )

    def _losses(
        self, latents: Tensor, text: TextConditioning, counters: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Compute the denoising loss of each sample, ``(B,)``."""
        schedule = self.generator.schedule
        draws = torch.tensor([counter_uniform("timestep", *counter) for counter in counters])
        timesteps = schedule.shifted_timesteps(draws, self.timestep_shift).to(latents.device)
        noise = counter_normal("training noise", counters, latents.shape[1:]).to(latents)
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = self.generator.predict(noisy, timesteps, text)
        losses = denoising_loss(output, schedule.training_target(latents, noise, timesteps))
        if self.min_snr_gamma is None:
            return losses
        return losses * min_snr_weights(schedule, timesteps, self.min_snr_gamma)
