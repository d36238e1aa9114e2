"""Parts of an exported folder that diffusers and transformers do not have: plain JSON settings."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, ModelMixin
from transformers import FeatureExtractionMixin

from segalign.diffusion.latents import PixelUnshuffleCodec
from segalign.diffusion.schedule import NoiseSchedule
from segalign.diffusion.scheduler_sampler import Spacing
from segalign.errors import DataError
from segalign.json_text import parse_json
from segalign.text.adapter import TextAdapter, load_adapter, save_adapter
from segalign.text.segmenters import build_segmenter, describe_segmenter
from segalign.text.settings import TextEncoding
from segalign.text.special_tokens import SpecialTokenPolicy

_CLOSE = 1e-12


class JsonPart(FeatureExtractionMixin):
    """A part of a pipeline that is settings alone, kept as one JSON file.

    Args:
        settings: The settings, plain data.
    """

    file_name = "config.json"

    def __init__(self, **settings: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings = settings

    # Both take whatever diffusers passes to the parts of a pipeline, and need none of it.
    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """Write the settings into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=2) + "\n"
        (folder / self.file_name).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **__: Any) -> Self:
        """Read the settings from a folder.

        Raises:
            DataError: If they are not there or are no settings.
        """
        file = Path(pretrained_model_name_or_path) / cls.file_name
        try:
            return cls(**parse_json(file.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"expected settings in `{file}`; got: {error}. Export the run again."
            ) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({json.dumps(self.settings)})"


class SegmentEncoding(JsonPart):
    """How a pipeline encodes captions: the segment encoder's settings around the text models."""

    @classmethod
    def describe(cls, text: TextEncoding) -> Self:
        """Take the settings of a text encoding; where T5 and stored features lay is left out."""
        kept = replace(text, t5=None, feature_store=None, feature_store_2=None)
        return cls(**{field.name: _plain(getattr(kept, field.name)) for field in fields(kept)})

    def encoding(self) -> TextEncoding:
        """Make the text encoding.

        Raises:
            DataError: If the settings are of another version.
        """
        settings = dict(self.settings)
        try:
            if settings.get("segmenter") is not None:
                settings["segmenter"] = build_segmenter(settings["segmenter"])
            settings["policy"] = SpecialTokenPolicy(**settings["policy"])
            return TextEncoding(**settings)
        except (TypeError, KeyError) as error:
            raise DataError(
                f"expected the settings of a text encoding; got: {error}. "
                "Export the run with this version of segalign."
            ) from error


class PixelUnshuffle(JsonPart):
    """The exact codec of small images in place of a VAE: see ``PixelUnshuffleCodec``."""

    def codec(self) -> PixelUnshuffleCodec:
        """Make the codec."""
        return PixelUnshuffleCodec(int(self.settings["factor"]))


class AdapterPart(TextAdapter, ModelMixin):
    """The adapter of the whole-caption encoder, in its official layout."""

    @classmethod
    def of(cls, adapter: TextAdapter) -> Self:
        """Copy an adapter."""
        part = cls(adapter.in_dim, adapter.int_dim, adapter.out_dim)
        part.load_state_dict(adapter.state_dict())
        return part.eval()

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the adapter into a folder."""
        save_adapter(self, Path(save_directory))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> Self:
        """Read the adapter from a folder.

        Raises:
            DataError: If it is damaged.
        """
        return cls.of(load_adapter(pretrained_model_name_or_path)).to(torch_dtype)


def make_scheduler(schedule: NoiseSchedule, spacing: Spacing) -> Any:
    """Make the scheduler of diffusers that has a model's noise levels.

    Diffusers knows no ``official`` spacing; where steps divide the timesteps it is ``trailing``.
    """
    return DDIMScheduler(
        **_noise_levels(schedule),
        prediction_type=schedule.prediction_type,
        num_train_timesteps=schedule.num_timesteps,
        clip_sample=False,
        timestep_spacing="trailing" if spacing == "official" else spacing,
        steps_offset=1 if spacing == "leading" else 0,
    )


def _noise_levels(schedule: NoiseSchedule) -> dict[str, Any]:
    """Name the betas of a schedule by their usual formula, or else list them."""
    alphas, betas = schedule.alphas_cumprod, schedule.betas()
    for kind in ("scaled_linear", "linear"):
        named = {
            "num_train_timesteps": schedule.num_timesteps,
            "beta_start": round(betas[0].item(), 9),
            "beta_end": round(betas[-1].item(), 9),
            "beta_schedule": kind,
        }
        found = NoiseSchedule.from_config(named).alphas_cumprod
        if (found - alphas).abs().max() < _CLOSE:
            del named["num_train_timesteps"]
            return named
    return {"trained_betas": betas.tolist()}


def _plain(value: Any) -> Any:
    """Turn a setting into plain data."""
    if value is None or isinstance(value, str | int | float):
        return value
    if is_dataclass(value) and not hasattr(value, "split"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return describe_segmenter(value)
