"""Text-to-image models of diffusers, from the hub, from a folder, or with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segalign.diffusion.bundle import DiffusionBundle
from segalign.diffusion.latents import VAECodec
from segalign.diffusion.lora import read_lora
from segalign.diffusion.model_sizes import ModelParts, Size, random_parts
from segalign.diffusion.network_files import check_whole, reading
from segalign.diffusion.schedule import NoiseSchedule
from segalign.formats.lora_pairs import merge_lora
from segalign.hub import fetch
from segalign.json_text import parse_json
from segalign.text.text_models import TextModels

Dtype = Literal["float32", "bfloat16"]
Part = TypeVar("Part")

_WHAT = "the text-to-image model"
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_PARTS_2 = ("text_encoder_2", "tokenizer_2")


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A Stable Diffusion 1.x or XL model in diffusers layout, or one of its shape.

    Args:
        model: Hub id or local folder with ``unet/ vae/ text_encoder/ tokenizer/ scheduler/``, and
            for SDXL ``text_encoder_2/ tokenizer_2/``. Only safetensors are read.
        init: ``pretrained`` reads ``model``; ``random`` builds ``size`` from built-in configs, and
            nothing is read or downloaded.
        size: Size of a random model.
        seed: Seed of a random model's weights.
        dtype: Precision of all weights. Frozen ones can be bfloat16; whatever is trained must be
            float32, so a network that is trained whole needs ``float32``.
        loras: Low-rank updates merged into the UNet, in order: official list files
            (``lora_vis.pt``) or LoRA folders in diffusers layout. Their sum is added in float32
            and rounded once, to ``dtype``.
        gradient_checkpointing: Recompute the UNet's activations in backward; costs one more
            forward and saves most of the memory.
        channels_last: Keep the weights of convolutions channels last, which GPUs prefer.
    """

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    init: Literal["pretrained", "random"] = "pretrained"
    size: Size = "sd15"
    seed: int = 0
    dtype: Dtype = "float32"
    loras: list[str] = field(default_factory=list)
    gradient_checkpointing: bool = False
    channels_last: bool = False

    def load(self, device: torch.device | str = "cpu") -> DiffusionBundle:
        """Read or build the model.

        Args:
            device: Where to; ``meta`` gives a random model's shapes alone, at no cost.

        Raises:
            ConfigError: If it is not there, or cannot be read.
            DataError: If a LoRA cannot be read or is of another model.
        """
        device = torch.device(device)
        if self.init == "random":
            parts = random_parts(self.size, seed=self.seed, device=device)
        else:
            parts = read_parts(self.model)
        if self.loras:
            merge_lora(parts.unet, [read_lora(path, parts.unet) for path in self.loras])
        self._settle(parts, device)
        scale = 2 ** (len(parts.vae.config.block_out_channels) - 1)
        return DiffusionBundle(
            unet=parts.unet,
            text_models=parts.text_models,
            codec=VAECodec(parts.vae),
            schedule=NoiseSchedule.from_config(parts.scheduler_config),
            image_size=parts.unet.config.sample_size * scale,
        )

    def _settle(self, parts: ModelParts, device: torch.device) -> None:
        """Give all networks their precision, place and layout."""
        text = parts.text_models
        for part in (parts.unet, parts.vae, text.text_model, text.text_model_2):
            if part is None:
                continue
            # The libraries' own `to` would log a warning at a change of precision.
            nn.Module.to(part, device=device, dtype=getattr(torch, self.dtype))
            if self.channels_last:
                nn.Module.to(part, memory_format=torch.channels_last)
        if self.gradient_checkpointing:
            parts.unet.enable_gradient_checkpointing()


def read_parts(model: str) -> ModelParts:
    """Read a model in diffusers layout, in float32.

    Args:
        model: Hub id or local folder.

    Raises:
        ConfigError: If it is not there, or a part cannot be read.
    """
    folder = fetch(model, what=_WHAT, parts=_PARTS)
    has_two_towers = _has_two_towers(folder)
    if has_two_towers:
        folder = fetch(model, what=_WHAT, parts=(*_PARTS, *_PARTS_2))
    text_model, tokenizer = read_text_tower(folder)
    text_2 = tokenizer_2 = None
    if has_two_towers:
        text_2, tokenizer_2 = read_second_text_tower(folder)
    return ModelParts(
        unet=_read_weights(UNet2DConditionModel, folder / "unet", "torch_dtype"),
        vae=_read_weights(AutoencoderKL, folder / "vae", "torch_dtype"),
        text_models=TextModels(
            text_model=text_model,
            tokenizer=tokenizer,
            text_model_2=text_2,
            tokenizer_2=tokenizer_2,
        ),
        scheduler_config=_read(_read_scheduler, folder / "scheduler"),
    )


def read_text_tower(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Read ``text_encoder/`` and ``tokenizer/`` of a local diffusers folder, in float32.

    Raises:
        ConfigError: If a weight or file is missing, damaged, or of another kind of model.
    """
    text_model = _read_weights(CLIPTextModel, folder / "text_encoder", "dtype")
    return text_model, _read(_read_tokenizer, folder / "tokenizer")


def read_second_text_tower(folder: Path) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """Read ``text_encoder_2/`` and ``tokenizer_2/``: see :func:`read_text_tower`."""
    text_model = _read_weights(CLIPTextModelWithProjection, folder / "text_encoder_2", "dtype")
    return text_model, _read(_read_tokenizer, folder / "tokenizer_2")


def _has_two_towers(folder: Path) -> bool:
    """Tell whether a model has a second text tower, by its index or else by its folders."""
    index = folder / "model_index.json"
    if index.is_file():
        try:
            return bool(parse_json(index.read_bytes()).get("text_encoder_2", [None])[0])
        except (ValueError, LookupError, TypeError, AttributeError):
            pass
    return (folder / "text_encoder_2").is_dir()


def _read_weights(network: type[Part], folder: Path, dtype_key: str) -> Part:
    """Read one network in float32; the libraries would draw what its file lacks."""
    settings = {dtype_key: torch.float32, "use_safetensors": True, "output_loading_info": True}
    loaded, info = _read(network.from_pretrained, folder, **settings)  # type: ignore[attr-defined]
    check_whole(info, _part(folder), folder)
    return cast("Part", loaded)


def _read_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read a tokenizer; the library would make an empty one where files are missing."""
    whole = (["tokenizer.json"], ["vocab.json", "merges.txt"])
    if not any(all((folder / name).is_file() for name in names) for names in whole):
        raise FileNotFoundError("no `tokenizer.json`, nor `vocab.json` with `merges.txt`")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _read_scheduler(folder: Path) -> Mapping[str, Any]:
    """Read the config of the noise levels."""
    return {**DDPMScheduler.load_config(folder)}


def _read(reader: Callable[..., Part], folder: Path, **settings: Any) -> Part:
    """Read one part."""
    with reading(_part(folder), folder):
        return reader(folder, **settings)


def _part(folder: Path) -> str:
    return f"{_WHAT}'s `{folder.name}`"
