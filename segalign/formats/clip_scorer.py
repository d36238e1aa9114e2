"""CLIP-type preference models in Hugging Face layout: Denscore, PickScore, any ``CLIPModel``.

Dims: B batch, N texts, D text width, E joint-embedding width, S side of the image tower's input.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from segalign.errors import ConfigError, DataError
from segalign.formats.folders import new_folder
from segalign.hub import fetch
from segalign.json_text import parse_json
from segalign.tensor_pickle import is_plain_tensor, read_tensor_pickle
from segalign.text.text_states import TextModel
from segalign.text.tokenizer import TextCleaning, clip_tokenizer

ResizeFilter = Literal["bicubic", "bilinear"]
ImageFit = Literal["crop", "squash", "pad"]

_PICKLED = "pytorch_model.bin"
_RESAMPLING: Mapping[ResizeFilter, int] = {"bilinear": 2, "bicubic": 3}  # as PIL counts them
_EXPECTED = "a whole CLIP model in Hugging Face layout"
_REMEDY = "download it again or choose another"
_LOADING_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How a scorer wants its images: square, in [0, 1], then ``(image - mean) / std``.

    Attributes:
        image_size: Side in pixels.
        mean: Of each colour; the default is CLIP's.
        std: Of each colour.
        resize: Filter, with antialiasing; ``bicubic`` is CLIP's.
        fit: How others than squares become squares: the short side is resized and the centre cut
            (``crop``), both sides are resized (``squash``), or the long side is resized and the
            rest is black (``pad``).
        round_half: The centre of an odd margin: transformers rounds ``down``, ``open_clip`` to the
            ``even`` number of pixels.
    """

    image_size: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    resize: ResizeFilter = "bicubic"
    fit: ImageFit = "crop"
    round_half: Literal["down", "even"] = "down"


class Scorer(Protocol):
    """A CLIP-type model of any library, and what its inputs need."""

    @property
    def model(self) -> nn.Module:
        """The two towers."""
        ...

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer."""
        ...

    @property
    def image_settings(self) -> ImageSettings:
        """Size and normalisation of the images."""
        ...

    @property
    def cleaning(self) -> TextCleaning:
        """Repair of texts before they are tokenized, as the model's own pipeline does."""
        ...

    @property
    def width(self) -> int:
        """Joint-embedding width E."""
        ...

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature, ``(1,)``."""
        ...

    def text_tower(self) -> TextModel:
        """Return the text model, sharing its weights."""
        ...

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embed preprocessed images, ``(B, 3, S, S)`` to ``(B, E)``, not normalised.

        Images are pooled as the model has it: at the class token, by averaging, by attention.
        """
        ...

    def project_text(self, end_states: Tensor) -> Tensor:
        """Map pooled states of the text tower to the joint space, ``(N, E)``, not normalised."""
        ...


class ClipScorer(NamedTuple):
    """A ``CLIPModel`` of transformers and what its inputs need: a ``Scorer``.

    Attributes:
        model: The two towers; float32, frozen and in evaluation mode where they were loaded.
        tokenizer: Its tokenizer.
        image_settings: Size and normalisation of its images.
        cleaning: Repair of texts. Neither transformers' tokenizer nor the published scorers of
            this layout have one.
    """

    model: CLIPModel
    tokenizer: CLIPTokenizer
    image_settings: ImageSettings
    cleaning: TextCleaning = "none"

    @property
    def width(self) -> int:
        """See ``Scorer``."""
        return self.model.visual_projection.out_features

    @property
    def logit_scale(self) -> Tensor:
        """See ``Scorer``."""
        return self.model.logit_scale.reshape(1)

    def text_tower(self) -> TextModel:
        """See ``Scorer``."""
        text_model: TextModel = self.model.text_model
        return text_model

    def encode_image(self, pixels: Tensor) -> Tensor:
        """See ``Scorer``: the class token's state, projected."""
        states = self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).pooler_output
        features: Tensor = self.model.visual_projection(states)
        return features

    def project_text(self, end_states: Tensor) -> Tensor:
        """See ``Scorer``."""
        features: Tensor = self.model.text_projection(end_states.to(self.model.dtype))
        return features


def load_clip_scorer(source: str) -> ClipScorer:
    """Read a scorer; no code in its files can run.

    Args:
        source: Folder or hub id of a ``CLIPModel`` (``config.json`` and ``model.safetensors`` or
            ``pytorch_model.bin``). A missing tokenizer is CLIP's own, missing image settings too.

    Raises:
        ConfigError: If it is not there.
        DataError: If it is damaged, incomplete or not a CLIP model.
    """
    what = "the scorer"
    folder = fetch(source, what=what)
    is_pickled = not any(folder.glob("*.safetensors"))
    if is_pickled:
        folder = fetch(source, what=what, also=(_PICKLED,))
    _check_is_clip(folder)
    model = _load_model(folder, is_pickled=is_pickled)
    config: Any = model.config
    tokenizer = _load_tokenizer(folder)
    num_entries, num_rows = len(tokenizer), config.text_config.vocab_size
    if num_entries > num_rows:
        raise _unusable(folder, f"a tokenizer of {num_entries} entries for {num_rows} embeddings")
    settings = _load_image_settings(folder, config.vision_config.image_size)
    return ClipScorer(model, tokenizer, settings)


def save_clip_scorer(scorer: ClipScorer, folder: Path) -> None:
    """Write a scorer as a Hugging Face folder, whole or not at all.

    ``CLIPModel``, ``CLIPTokenizer`` and ``CLIPImageProcessor`` load it, and `load_clip_scorer`.
    The layout has no place for text cleaning.

    Raises:
        ConfigError: If the folder has content, or images are padded, which the layout cannot say.
        StorageError: If it cannot be written.
    """
    processor = _image_processor(scorer.image_settings)
    with new_folder(folder) as unfinished:
        scorer.model.save_pretrained(unfinished)
        scorer.tokenizer.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)


def _check_is_clip(folder: Path) -> None:
    try:
        kind = parse_json((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise _unusable(folder, f"no readable `config.json` ({error})") from error
    if kind != "clip":
        raise _unusable(folder, f"a model of type `{kind}`")


def _load_model(folder: Path, *, is_pickled: bool) -> CLIPModel:
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "use_safetensors": True}
    if is_pickled:
        source = {"pretrained_model_name_or_path": None, "state_dict": _read_pickled(folder)}
    try:
        config = CLIPConfig.from_pretrained(folder)
        loaded: Any = CLIPModel.from_pretrained(
            **source, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (*_LOADING_ERRORS, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _unusable(folder, reason) from error
    model, report = loaded
    if report["missing_keys"]:
        raise _unusable(folder, f"no tensor `{min(report['missing_keys'])}`")
    scorer: CLIPModel = model.eval().requires_grad_(False)
    return scorer


def _read_pickled(folder: Path) -> dict[str, Tensor]:
    content = read_tensor_pickle(folder / _PICKLED, expected=_EXPECTED, remedy=_REMEDY)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and is_plain_tensor(value) for name, value in content.items()
    ):
        raise _unusable(folder, f"a `{_PICKLED}` of other things than named tensors")
    return dict(content)


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return clip_tokenizer()
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    except _LOADING_ERRORS as error:
        raise _unusable(folder, f"a tokenizer that cannot be read ({error})") from error
    return tokenizer


def _image_processor(settings: ImageSettings) -> CLIPImageProcessor:
    if settings.fit == "pad":
        raise ConfigError(
            "expected images that are cropped or squashed for a Hugging Face folder; got `pad`; "
            "choose another `fit`"
        )
    side = {"height": settings.image_size, "width": settings.image_size}
    is_cropped = settings.fit == "crop"
    return CLIPImageProcessor(
        size={"shortest_edge": settings.image_size} if is_cropped else side,
        do_center_crop=is_cropped,
        crop_size=side,
        resample=_RESAMPLING[settings.resize],
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )


def _load_image_settings(folder: Path, side: int) -> ImageSettings:
    files = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in files):
        return ImageSettings(image_size=side)
    try:
        processor = CLIPImageProcessor.from_pretrained(folder)
        mean, std = tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))
    except _LOADING_ERRORS as error:
        raise _unusable(folder, f"image settings that cannot be read ({error})") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise _unusable(folder, f"image mean {mean} and deviation {std}")
    filters = [name for name, number in _RESAMPLING.items() if number == processor.resample]
    if not filters:
        raise _unusable(folder, f"the resize filter {processor.resample}")
    fit = _image_fit(folder, processor, side)
    return ImageSettings(image_size=side, mean=mean, std=std, resize=filters[0], fit=fit)


def _image_fit(folder: Path, processor: CLIPImageProcessor, side: int) -> ImageFit:
    """Find out how images become squares of the model's size."""
    size, cut = dict(processor.size), dict(processor.crop_size or {})
    square = {"height": side, "width": side}
    if size == square:
        return "squash"
    if size == {"shortest_edge": side} and cut == square and processor.do_center_crop:
        return "crop"
    raise _unusable(folder, f"images resized to {size} and cut to {cut} for an input of {side}")


def _unusable(folder: Path, found: str) -> DataError:
    return DataError(f"expected {_EXPECTED} in `{folder}`; got {found}; {_REMEDY}")
