"""A pipeline of diffusers for long prompts.

Dims: B prompts, c/h/w latents, H/W pixels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from segalign.diffusion.generator import TextToImage, Weights
from segalign.diffusion.latents import LatentCodec, VAECodec
from segalign.diffusion.pipeline_parts import (
    AdapterPart,
    PixelUnshuffle,
    SegmentEncoding,
)
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import (
    Sampler,
    SchedulerName,
    Spacing,
    change_sampler,
    make_sampler,
)
from segalign.errors import ConfigError
from segalign.pictures import to_uint8
from segalign.text.conditioning import TextConditioner, TextConditioning
from segalign.text.t5_encoder import T5Encoder
from segalign.text.text_models import TextModels

OutputType = Literal["pil", "pt"]


class LongTextPipeline(DiffusionPipeline):
    """Make images from prompts of any length with an exported model.

    Load it with ``LongTextPipeline.from_pretrained(FOLDER)``.

    Args:
        unet: Denoising network, LoRA merged.
        vae: Autoencoder, or the settings of the exact codec of small images.
        text_encoder: CLIP text model.
        tokenizer: Its tokenizer.
        scheduler: Noise levels and parameterisation; how steps are taken is ``sampler``'s.
        segment_encoder: Settings of the segment encoding.
        text_encoder_2: Second tower of SDXL.
        tokenizer_2: Its tokenizer.
        t5_encoder: Whole-caption encoder.
        t5_tokenizer: Its tokenizer.
        t5_adapter: Maps its features to the network's width.
        image_size: Side of an image in pixels.
        sampler: Default sampler: ``ddim``, ``unipc`` or ``dpmpp``.
        num_inference_steps: Default number of steps.
        guidance_scale: Default factor of classifier-free guidance; 1 is off.
        spacing: Which timesteps the steps are taken at.
        sampler_settings: The sampler's others, `eta` and guidance, as `make_sampler` takes them.
        t5_settings: Token budget and treatment of padding of the whole-caption encoder.
        dtypes: Precision of each part in the run, by name; parts that come in float32 are rounded
            to it. None leaves all as they are.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->t5_encoder->t5_adapter->unet->vae"
    _optional_components: ClassVar[list[str]] = [
        "text_encoder_2",
        "tokenizer_2",
        "t5_encoder",
        "t5_tokenizer",
        "t5_adapter",
    ]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | PixelUnshuffle,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        segment_encoder: SegmentEncoding,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        t5_encoder: T5EncoderModel | None = None,
        t5_tokenizer: PreTrainedTokenizerBase | None = None,
        t5_adapter: AdapterPart | None = None,
        image_size: int = 512,
        sampler: str = "ddim",  # diffusers warns of annotations such as `SchedulerName`
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        spacing: str = "trailing",
        sampler_settings: dict[str, Any] | None = None,
        t5_settings: dict[str, Any] | None = None,
        dtypes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            segment_encoder=segment_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            t5_encoder=t5_encoder,
            t5_tokenizer=t5_tokenizer,
            t5_adapter=t5_adapter,
        )
        self.register_to_config(
            image_size=image_size,
            sampler=sampler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            spacing=spacing,
            sampler_settings=sampler_settings,
            t5_settings=t5_settings,
            dtypes=dtypes,
        )
        for name, dtype in (dtypes or {}).items():
            _round_part(getattr(self, name), getattr(torch, dtype))
        self.sampler: Sampler = make_sampler(
            cast("SchedulerName", sampler),
            num_inference_steps,
            guidance_scale,
            cast("Spacing", spacing),
            **(sampler_settings or {}),
        )
        self._conditioner: TextConditioner | None = None
        self._placement: tuple[Any, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **settings: Any) -> Self:
        """Load an exported folder, every part in the precision that it had in the run.

        Args:
            pretrained_model_name_or_path: The folder.
            settings: What diffusers takes. ``dtype`` gives all parts one precision instead;
                the network lies in the folder in float32 wherever LoRA was merged.
        """
        if settings.get("dtype", settings.get("torch_dtype")) is not None:
            settings = {"dtypes": None, **settings}
        return cast("Self", super().from_pretrained(pretrained_model_name_or_path, **settings))

    @property
    def conditioner(self) -> TextConditioner:
        """The text encoder around this pipeline's text models; it remembers prompts."""
        models = (self.text_encoder, self.text_encoder_2, self.t5_encoder, self.t5_adapter)
        # Made anew when a model was exchanged, moved or cast, so that no memory is stale.
        placement = tuple(_placement(model) for model in models)
        if self._conditioner is None or placement != self._placement:
            self._conditioner = self.segment_encoder.encoding().build(self._text_models())
            self._placement = placement
        return self._conditioner

    @property
    def generator(self) -> TextToImage:
        """The generator that the training modules use, around this pipeline's parts."""
        is_exact = isinstance(self.vae, PixelUnshuffle)
        codec: LatentCodec = self.vae.codec() if is_exact else VAECodec(self.vae)
        return TextToImage(
            self.unet,
            self.conditioner,
            codec,
            NoiseSchedule.from_config(self.scheduler.config),
            image_size=self.config.image_size,
            mask_padding=self.segment_encoder.encoding().mask_padding,
        )

    def encode_prompt(self, prompt: str | Sequence[str]) -> TextConditioning:
        """Encode prompts as the network sees them."""
        return self.conditioner([prompt] if isinstance(prompt, str) else list(prompt))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        sampler: SchedulerName | None = None,
        output_type: OutputType = "pil",
    ) -> ImagePipelineOutput:
        """Make an image for each prompt.

        Args:
            prompt: One prompt or B of them, of any length.
            num_inference_steps: Steps; None takes the exported setting.
            guidance_scale: Factor of classifier-free guidance; None takes the exported setting.
            seed: Makes the noise as ``main.py generate`` does: of the seed and the position.
            generator: Draws the noise instead.
            latents: The noise itself, standard normal, ``(B, c, h, w)``.
            sampler: ``ddim``, ``unipc`` or ``dpmpp``; None takes the exported setting.
            output_type: ``pil``, or ``pt`` for a float tensor in [0, 1], ``(B, 3, H, W)``.

        Returns:
            An object with ``images``.

        Raises:
            ConfigError: If more than one of ``seed``, ``generator`` and ``latents`` is given.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        noise = self._noise(len(prompts), seed, generator, latents)
        chosen = change_sampler(self.sampler, sampler, num_inference_steps, guidance_scale)
        images = self._sample(prompts, noise, chosen)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        return ImagePipelineOutput(images=[Image.fromarray(array) for array in to_uint8(images)])

    def generate(
        self,
        captions: Sequence[str],
        sample_ids: Sequence[int],
        eval_seed: int | Sequence[int],
        weights: Weights = "raw",
    ) -> Tensor:
        """Make images in [0, 1], ``(B, 3, H, W)``: see ``ImageGenerator``.

        ``weights`` makes no difference: an exported folder holds one set.
        """
        return self._sample(captions, self.generator.noise(sample_ids, eval_seed), self.sampler)

    def _sample(self, captions: Sequence[str], noise: Tensor, sampler: Sampler) -> Tensor:
        """Sample with latents in float32, whatever the precision of the networks."""
        noise = noise.to(self._execution_device, torch.float32)
        images = self.generator.sample(captions, noise, sampler)
        self.maybe_free_model_hooks()
        return images

    def _noise(
        self,
        batch_size: int,
        seed: int | None,
        generator: torch.Generator | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Take or draw the starting latents."""
        given = [each for each in (seed, generator, latents) if each is not None]
        if len(given) > 1:
            raise ConfigError(
                "expected one of `seed`, `generator` and `latents`; got more. Give one."
            )
        if seed is not None:
            return self.generator.noise(range(batch_size), seed)
        size = self.config.image_size
        shape = (batch_size, *self.generator.codec.latent_shape(size, size))
        if latents is None:
            device = torch.device("cpu") if generator is None else generator.device
            return torch.randn(shape, generator=generator, device=device)
        if tuple(latents.shape) != shape:
            raise ConfigError(
                f"expected `latents` of shape {shape}; got {tuple(latents.shape)}. Reshape them."
            )
        return latents

    def _text_models(self) -> TextModels:
        t5 = None
        if self.t5_encoder is not None:
            t5 = T5Encoder(
                self.t5_encoder,
                self.t5_tokenizer,
                adapter=self.t5_adapter,
                **(self.config.t5_settings or {}),
            )
        return TextModels(
            text_model=self.text_encoder,
            tokenizer=self.tokenizer,
            text_model_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            t5=t5,
        )


def _round_part(part: object, dtype: torch.dtype) -> None:
    """Give a part its precision, unless it was loaded in one that was asked for."""
    if isinstance(part, nn.Module) and next(part.parameters()).dtype == torch.float32:
        nn.Module.to(part, dtype)  # the libraries' own `to` would warn of casts


def _placement(model: nn.Module | None) -> tuple[Any, ...]:
    """Tell where a model is and in which precision."""
    if model is None:
        return ()
    weight = next(model.parameters())
    return id(model), weight.device, weight.dtype
