"""Export a generator as a folder that loads as a pipeline of diffusers."""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import logging

from segalign.diffusion.generator import TextToImage
from segalign.diffusion.latents import PixelUnshuffleCodec, VAECodec
from segalign.diffusion.long_text_pipeline import LongTextPipeline
from segalign.diffusion.merged_lora import merge_layer
from segalign.diffusion.model_card import ModelCard
from segalign.diffusion.pipeline_parts import (
    AdapterPart,
    PixelUnshuffle,
    SegmentEncoding,
    make_scheduler,
)
from segalign.diffusion.scheduler_sampler import Sampler, sampler_name, sampler_settings
from segalign.errors import ConfigError, DataError
from segalign.formats.folders import new_folder
from segalign.json_text import parse_json
from segalign.run_directory import file_digest
from segalign.text.settings import TextEncoding
from segalign.text.text_models import TextModels

RECORD_FILE = "export.json"
CARD_FILE = "README.md"
INDEX_FILE = "model_index.json"
FORMAT_VERSION = 1
# Lets `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER)` find the class.
_PIPELINE_CODE = '''\
"""Hands the pipeline class to diffusers; needs the package `segalign`."""

from segalign.diffusion.long_text_pipeline import LongTextPipeline

__all__ = ["LongTextPipeline"]
'''


class TextToImageModel(Protocol):
    """What can be exported: a training module, or whatever has these parts.

    Attributes:
        generator: Network, codec and noise levels.
        text: How captions are encoded.
        text_models: The text models.
        sampler: How images are made by default.
    """

    generator: TextToImage
    text: TextEncoding
    text_models: TextModels
    sampler: Sampler


def save_pipeline_folder(model: TextToImageModel, folder: Path, card: ModelCard) -> None:
    """Write a model as a pipeline folder, whole or not at all.

    Low-rank adapters are merged in float32 and the network is kept so; every other part keeps the
    precision it has. The folder names the precision of each part in the run, and loads at it: the
    merged network is rounded once, then. Tensors are safetensors.

    Images are those of the model to 1e-5 where all its weights are float32, or are loaded as such.
    Under a bfloat16 network they differ by about as much as its own rounding changes them: on
    average over pixels by 0.001 to 0.005, in single ones by up to 0.06, in [0, 1].

    Args:
        model: The model, with the weights to export in place. It is not changed.
        folder: New folder; its parents are created.
        card: What the model card says.

    Raises:
        ConfigError: If the folder has content, or the codec cannot be exported.
        StorageError: If the folder cannot be written; nothing is left behind.
    """
    pipeline = make_pipeline(model)
    pipeline.register_to_config(dtypes=_part_dtypes(pipeline, model.generator.unet.dtype))
    with new_folder(folder) as temporary, _without_progress_bars():
        pipeline.save_pretrained(temporary, safe_serialization=True)
        (temporary / "pipeline.py").write_text(_PIPELINE_CODE, encoding="utf-8")
        (temporary / CARD_FILE).write_text(card.pipeline_text(), encoding="utf-8")
        write_record(temporary, {"checkpoint": card.checkpoint, "step": card.step})


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for each file."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def make_pipeline(model: TextToImageModel) -> LongTextPipeline:
    """Put a model's parts together as a pipeline; a network with LoRA is copied, in float32.

    Raises:
        ConfigError: If the codec is of an unknown kind.
    """
    generator, models, sampler = model.generator, model.text_models, model.sampler
    t5 = models.t5
    return LongTextPipeline(
        unet=merge_adapters(generator.unet),
        vae=_vae(generator.codec),
        text_encoder=models.text_model,
        tokenizer=models.tokenizer,
        scheduler=make_scheduler(generator.schedule, sampler.spacing),
        segment_encoder=SegmentEncoding.describe(model.text),
        text_encoder_2=models.text_model_2,
        tokenizer_2=models.tokenizer_2,
        t5_encoder=None if t5 is None else t5.model,
        t5_tokenizer=None if t5 is None else t5.tokenizer,
        t5_adapter=None if t5 is None or t5.adapter is None else AdapterPart.of(t5.adapter),
        image_size=generator.image_size,
        sampler=sampler_name(sampler),
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
        spacing=sampler.spacing,
        sampler_settings=sampler_settings(sampler),
        t5_settings=None
        if t5 is None
        else {"token_budget": t5.token_budget, "attend_to_padding": t5.attend_to_padding},
    )


def merge_adapters(unet: Any) -> UNet2DConditionModel:
    """Return a float32 copy with the low-rank adapters merged; the network itself if it has none.

    Args:
        unet: Network of diffusers, with or without PEFT layers. It is not changed.
    """
    if not has_adapters(unet):
        return unet
    merged = copy.deepcopy(unet)
    nn.Module.to(merged, torch.float32)  # the method of diffusers warns of casts
    for layer in merged.modules():
        if isinstance(layer, BaseTunerLayer):
            merge_layer(layer)
    merged.unload_lora()
    return merged


def has_adapters(unet: Any) -> bool:
    """Tell whether a network has low-rank adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in unet.modules())


def check_files(folder: Path) -> None:
    """Check that the files of an exported folder are those that were written.

    The model card is for people to edit, so it may differ.

    Raises:
        DataError: If one differs or is missing, or the folder of a part holds another one.
    """
    try:
        files = dict(parse_json((folder / RECORD_FILE).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"expected the record `{RECORD_FILE}` of an export in `{folder}`; got: {error}. "
            "Export the run again."
        ) from error
    found = _digests(folder)
    # The libraries prefer some names to others, so that a file more can be other weights.
    parts = {name.partition("/")[0] for name in files if "/" in name}
    looked_at = {*files, *(name for name in found if name.partition("/")[0] in parts)}
    for name in sorted(looked_at - {CARD_FILE}):
        if found.get(name) != files.get(name):
            what = "is missing" if name not in found else "differs"
            raise DataError(
                f"expected the export in `{folder}` as it was written; `{name}` "
                f"{what if name in files else 'was added'}. Export the run again."
            )


def write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what an export is of, and the digests of its files."""
    files = _digests(folder)
    record = {"format_version": FORMAT_VERSION, **facts, "files": files}
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _part_dtypes(pipeline: LongTextPipeline, unet_dtype: torch.dtype) -> dict[str, str]:
    """Name the precision of every network of a pipeline; of the UNet, that before merging."""
    parts = {
        name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }
    dtypes = {name: next(part.parameters()).dtype for name, part in parts.items()}
    dtypes["unet"] = unet_dtype
    return {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}


def _vae(codec: object) -> Any:
    """Return the part of a pipeline that stands for a codec."""
    if isinstance(codec, VAECodec):
        return codec.vae
    if isinstance(codec, PixelUnshuffleCodec):
        return PixelUnshuffle(factor=codec.factor)
    raise ConfigError(
        f"expected a model with a VAE or a PixelUnshuffleCodec; got `{type(codec).__name__}`. "
        "Export its LoRA alone with `--format lora`."
    )
