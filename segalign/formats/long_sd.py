"""The released LongSD: SD-1.5 with official LoRAs merged, T5 and an official adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.model_card import ModelCard
from segalign.diffusion.pipeline_folder import save_pipeline_folder
from segalign.diffusion.pretrained import PretrainedModel
from segalign.diffusion.scheduler_sampler import Sampler, SchedulerSampler
from segalign.errors import ConfigError
from segalign.run_directory import file_digest
from segalign.text.segmenter import OfficialSegmenter
from segalign.text.settings import T5Branch, TextEncoding
from segalign.text.text_models import TextModels

# As the official code samples: UniPC with the spacing that diffusers gives it by default.
OFFICIAL_SAMPLER = SchedulerSampler(
    scheduler="unipc", num_inference_steps=25, guidance_scale=7.5, spacing="linspace"
)


@dataclass(kw_only=True, eq=False)
class LongSD:
    """A model that `save_pipeline_folder` takes.

    Attributes:
        generator: Network with LoRAs merged, codec, noise levels.
        text: How captions are encoded: CLIP by official segments, and T5 on the whole.
        text_models: The text models, adapter included.
        sampler: The official sampler.
    """

    generator: TextToImage
    text: TextEncoding
    text_models: TextModels
    sampler: Sampler = OFFICIAL_SAMPLER


def load_long_sd(base: str, *, t5: str, adapter: str, loras: Sequence[str]) -> LongSD:
    """Read the parts of an official model; the LoRAs' sum is merged in float32, rounded once.

    Args:
        base: The base model, folder or hub id in diffusers layout (Stable Diffusion 1.5).
        t5: T5 model, folder or hub id.
        adapter: Adapter folder or hub id.
        loras: LoRA files (``lora_vis.pt``) of the stages, in their order: a stage's LoRA was
            trained on a network that held those before it.

    Raises:
        ConfigError: If a part is not there, or the widths do not fit.
        DataError: If a part is damaged or of another model.
    """
    bundle = PretrainedModel(model=base, loras=list(loras)).load()
    if bundle.text_models.text_model_2 is not None:
        raise ConfigError(
            f"expected a base of Stable Diffusion 1.x, LongSD's; `{base}` is an SDXL model; "
            "set `--base` to Stable Diffusion 1.5"
        )
    text = TextEncoding(
        context="clip+t5",
        segmenter=OfficialSegmenter(),
        t5=T5Branch(model=t5, adapter=adapter, train_adapter=False),
    )
    models = text.complete(bundle.text_models, int(bundle.unet.config.cross_attention_dim))
    generator = TextToImage(
        bundle.unet,
        text.build(models),
        bundle.codec,
        bundle.schedule,
        image_size=bundle.image_size,
        mask_padding=text.mask_padding,
    )
    return LongSD(generator=generator, text=text, text_models=models)


def write_pipeline(model: LongSD, folder: Path, *, base: str, loras: Sequence[str]) -> None:
    """Write a pipeline folder that `LongTextPipeline.from_pretrained` loads.

    Args:
        model: The model.
        folder: New folder.
        base: Name of the base, for the model card.
        loras: The LoRA files, whose digests the card names.

    Raises:
        ConfigError: If the folder has content.
        StorageError: If it cannot be written.
    """
    digests = [file_digest(Path(path).expanduser()) for path in loras]
    card = ModelCard(
        base=base,
        trained="by others: official LoRA, merged in float32, and T5 adapter",
        checkpoint=", ".join(digests),
        step=None,
        weights="raw",
        settings={"Text": repr(model.text), "Sampler": repr(model.sampler)},
    )
    save_pipeline_folder(model, folder, card)
