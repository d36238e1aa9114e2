"""What modules that train a text-to-image model share: building it, and generating with it."""

import contextlib
from collections.abc import Iterator, Sequence

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_modules.training import TrainingModule
from segalign.diffusion.bundle import BundleSource
from segalign.diffusion.generator import TextToImage, Weights
from segalign.diffusion.lora import LoraSettings
from segalign.diffusion.scheduler_sampler import Sampler
from segalign.modes import evaluation_mode
from segalign.sharding import kept_whole, shard_backbone
from segalign.text.settings import TextEncoding
from segalign.types import CaptionBatch


class GeneratorModule(TrainingModule):
    """Base of modules that train a text-to-image model; an ``ImageGenerator``.

    Args:
        base: Where the model comes from.
        optimizer: Makes the optimizer.
        lr_scheduler: Makes the learning-rate schedule; null keeps the rate constant.
        text: How captions are encoded.
        lora: Train low-rank adapters; null trains the whole network.
        train_text_model: Also train the text model.
        sampler: How images are generated for evaluation.
        eval_seed: Seeds the noise of evaluation.
    """

    def __init__(
        self,
        base: BundleSource,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        *,
        text: TextEncoding,
        lora: LoraSettings | None,
        train_text_model: bool,
        sampler: Sampler,
        eval_seed: int,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.base = base
        self.text = text
        self.lora = lora
        self.train_text_model = train_text_model
        self.sampler = sampler
        self.eval_seed = eval_seed
        # What only makes images, as `generate` does, needs no rewards.
        self.needs_objective = True

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
        if self.needs_objective:
            self.configure_objective()
        self.check_trained_precision()
        self.share_weights()
        self.train()

    @override
    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the denoising network; text models, codec and rewards stay whole."""
        shard_backbone(self.unet, mesh)

    def configure_objective(self) -> None:
        """Make what else the training needs, once the model is there; here: nothing."""

    @override
    def predict_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        return self.generate(
            batch["captions"], batch["sample_ids"].tolist(), self.eval_seed, self.best_weights
        )

    @override
    def test_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        """Do nothing: callbacks of the evaluation make the images that they need."""

    @property
    def best_weights(self) -> Weights:
        """The averaged weights where the run keeps them."""
        return "raw" if self.ema is None else "ema"

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make images in [0, 1], ``(B, 3, H, W)``: see ``ImageGenerator``."""
        noise = self.generator.noise(sample_ids, eval_seed).to(self.device)
        with (
            evaluation_mode(self),
            self.weights(weights),
            self.precision_context(),
            kept_whole(self.unet),
        ):
            return self.generator.sample(captions, noise, self.sampler)

    def precision_context(self) -> contextlib.AbstractContextManager[None]:
        """Compute as the trainer's steps do, also where a callback asks; without one, as it is."""
        if self._trainer is None:
            return contextlib.nullcontext()
        return self._trainer.precision_plugin.forward_context()

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
