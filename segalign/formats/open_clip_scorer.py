"""CLIP-type models of ``open_clip``: HPSv2, CLIP-H of LAION, image towers of timm.

Dims: B batch, N texts, E joint-embedding width, S side of the image tower's input.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.model import CLIP, CustomTextCLIP
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from segalign.errors import ConfigError, DataError
from segalign.formats.clip_scorer import ImageFit, ImageSettings
from segalign.hub import fetch
from segalign.json_text import parse_json
from segalign.tensor_pickle import is_plain_tensor, read_tensor_pickle
from segalign.text.open_clip_text import OpenClipText
from segalign.text.tokenizer import TextCleaning, clip_tokenizer

_CONFIG = "open_clip_config.json"
_SAFE, _PICKLED = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
_FITS: Mapping[str, ImageFit] = {"shortest": "crop", "squash": "squash", "longest": "pad"}
_BUFFERS = ("attn_mask", "position_ids")
_EXPECTED = "the weights of an `open_clip` model"
_REMEDY = "download it again, or name the architecture that it belongs to"


class OpenClipScorer(NamedTuple):
    """An ``open_clip`` model and what its inputs need: a ``Scorer``.

    Attributes:
        model: A ``CLIP`` or ``CustomTextCLIP``; float32, frozen and in evaluation mode where it
            was loaded.
        image_settings: Size and normalisation of its images.
        tokenizer: CLIP's, padding with ``!`` as ``open_clip`` does.
        cleaning: Repair of texts: that of ``open_clip``'s tokenizer.
    """

    model: nn.Module
    image_settings: ImageSettings
    tokenizer: CLIPTokenizer
    cleaning: TextCleaning = "open_clip"

    @property
    def width(self) -> int:
        """See ``Scorer``."""
        return self.text_tower().projected_width

    @property
    def logit_scale(self) -> Tensor:
        """See ``Scorer``."""
        model: Any = self.model
        scale: Tensor = model.logit_scale
        return scale.reshape(1)

    def text_tower(self) -> OpenClipText:
        """See ``Scorer``; it projects by itself."""
        return OpenClipText(self.model)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """See ``Scorer``."""
        visual: Any = self.model.visual
        # A model in low precision keeps its norms, and a tower's first weights, in float32.
        dtype = next((p.dtype for p in visual.parameters() if p.ndim == 4), pixels.dtype)
        features: Tensor = visual(pixels.to(dtype))
        return features

    def project_text(self, end_states: Tensor) -> Tensor:
        """See ``Scorer``: the tower has done it."""
        return end_states


def open_clip_scorer(
    model: nn.Module, image_settings: ImageSettings | None = None
) -> OpenClipScorer:
    """Make a scorer of a model in memory.

    Args:
        model: A ``CLIP`` or ``CustomTextCLIP`` with a causal text tower.
        image_settings: None takes those that ``open_clip.create_model`` left on it, else CLIP's.

    Raises:
        ConfigError: If the text tower is of another kind, or images are made square in another way.
    """
    visual: Any = model.visual
    if image_settings is None:
        image_settings = _image_settings(getattr(visual, "preprocess_cfg", {}), visual.image_size)
    scorer = OpenClipScorer(model, image_settings, clip_tokenizer("!"))
    scorer.text_tower()  # Refuses towers of another kind.
    return scorer


def random_open_clip_scorer(architecture: str) -> OpenClipScorer:
    """Make an untrained scorer, to measure size, memory and speed.

    Args:
        architecture: Name that ``open_clip.list_models()`` knows.

    Raises:
        ConfigError: If there is no such architecture, or its text tower is of another kind.
    """
    model = _build(_known_config(architecture), architecture)
    return open_clip_scorer(model.eval().requires_grad_(False))


def load_open_clip_scorer(
    source: str,
    *,
    architecture: str | None = None,
    file: str | None = None,
    image_settings: ImageSettings | None = None,
) -> OpenClipScorer:
    """Read a scorer; no code in its files can run.

    Args:
        source: File of weights (safetensors, or what ``torch.save`` wrote: tensors by name, alone
            or under ``state_dict``), or a folder or hub id that holds it.
        architecture: Name that ``open_clip.list_models()`` knows; None reads
            ``open_clip_config.json`` beside the weights.
        file: The file in the folder; None looks for ``open_clip``'s usual names.
        image_settings: None takes those of ``open_clip_config.json``; with an architecture's name
            alone ``open_clip``'s defaults: CLIP's mean and deviation, ``bicubic``, cropped.

    Raises:
        ConfigError: If it is not there, or the architecture is unknown or of another kind.
        DataError: If the weights are damaged, or not those of the architecture.
    """
    weights = _find_weights(source, file)
    config, settings = _described(weights, architecture)
    model = _build(config, architecture or str(weights.parent / _CONFIG))
    _load_weights(model, weights)
    visual: Any = model.visual
    return open_clip_scorer(
        model.eval().requires_grad_(False),
        image_settings or _image_settings(settings, visual.image_size),
    )


def _find_weights(source: str, file: str | None) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    what = "the scorer"
    for name in (file,) if file else (_SAFE, _PICKLED):
        folder = fetch(source, what=what, also=(name,))
        if (folder / name).is_file():
            return folder / name
    names = f"`{file}`" if file else f"`{_SAFE}` or `{_PICKLED}`"
    raise ConfigError(
        f"expected {_EXPECTED}, {names}, in `{source}`; there is no such file; give the name of "
        "the file"
    )


def _described(weights: Path, architecture: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config of the model and of its images."""
    if architecture is not None:
        return _known_config(architecture), {}
    path = weights.parent / _CONFIG
    if not path.is_file():
        raise ConfigError(
            f"expected `{_CONFIG}` beside `{weights}`; there is none; give the architecture's "
            "name, such as `ViT-H-14`"
        )
    try:
        described = parse_json(path.read_bytes())
        return dict(described["model_cfg"]), dict(described.get("preprocess_cfg") or {})
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"expected the config of an `open_clip` model in `{path}`; got "
            f"{type(error).__name__}; download it again"
        ) from error


def _known_config(architecture: str) -> dict[str, Any]:
    config: dict[str, Any] | None = None
    if architecture in open_clip.list_models():
        config = open_clip.get_model_config(architecture)
    if config is None:
        near = get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.3)
        raise ConfigError(
            f"expected the name of an `open_clip` architecture; got `{architecture}`; "
            f"near it are {', '.join(f'`{name}`' for name in near) or 'none'}"
        )
    return config


def _build(config: Mapping[str, Any], name: str) -> nn.Module:
    """Build an untrained model; unlike ``open_clip.create_model``, it never looks online."""
    settings = dict(config)
    is_custom = settings.pop("custom_text", False)
    text, vision = dict(settings.get("text_cfg", {})), dict(settings.get("vision_cfg", {}))
    foreign = [key for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)]
    if foreign or "multimodal_cfg" in settings:
        found = f"`{foreign[0]}: {text[foreign[0]]}`" if foreign else "a captioning model"
        raise ConfigError(
            f"expected an `open_clip` model with CLIP's text tower and tokenizer; `{name}` has "
            f"{found}; choose another, such as `ViT-H-14`"
        )
    vision["timm_model_pretrained"] = False
    kind = CustomTextCLIP if is_custom else CLIP
    try:
        model: nn.Module = kind(**{**settings, "vision_cfg": vision, "text_cfg": text})
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"expected an `open_clip` architecture that can be built; `{name}` cannot: "
            f"{_first_line(error)}; check it"
        ) from error
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load weights, all of them and no others."""
    weights = _read_weights(path)
    own = model.state_dict()
    # Old files carry buffers.
    weights = {k: v for k, v in weights.items() if not k.endswith(_BUFFERS)}
    # The inverse temperature is stored with and without a dimension.
    for name in own.keys() & weights.keys() & {"logit_scale", "logit_bias"}:
        weights[name] = weights[name].reshape(own[name].shape)
    if missing := own.keys() - weights.keys():
        raise _unusable(path, f"no tensor `{min(missing)}`")
    if unknown := weights.keys() - own.keys():
        raise _unusable(path, f"an unknown tensor `{min(unknown)}`")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise _unusable(path, _first_line(error, skip="Error(s)")) from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name, as float32."""
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unusable(path, _first_line(error)) from error
    else:
        content = read_tensor_pickle(path, expected=_EXPECTED, remedy=_REMEDY)
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and is_plain_tensor(value) for name, value in content.items()
    ):
        raise _unusable(path, "other things than named tensors")
    # Files of data-parallel training.
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in content.items()
    }


def _image_settings(described: Mapping[str, Any], size: Any) -> ImageSettings:
    """Translate ``open_clip``'s settings; what they lack is its default."""
    sides = set(size) if isinstance(size, tuple | list) else {size}
    kind = described.get("resize_mode") or "shortest"
    resize = described.get("interpolation") or "bicubic"
    if len(sides) != 1 or kind not in _FITS or described.get("fill_color"):
        raise ConfigError(
            f"expected square images, by `resize_mode` {', '.join(f'`{name}`' for name in _FITS)} "
            f"on black; got size {size}, `{kind}`, fill {described.get('fill_color')}; give "
            "`image_settings`"
        )
    colours = {
        name: _three(described[name]) for name in ("mean", "std") if described.get(name) is not None
    }
    return ImageSettings(
        image_size=sides.pop(),
        resize="bilinear" if resize == "bilinear" else "bicubic",
        fit=_FITS[kind],
        round_half="even",
        **colours,
    )


def _three(values: Any) -> tuple[float, ...]:
    """Repeat a number for three colours."""
    return tuple(values) if isinstance(values, tuple | list) else (values,) * 3


def _first_line(error: BaseException, skip: str = "\n") -> str:
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith(skip)]
    return next(iter(lines), type(error).__name__)


def _unusable(path: Path, found: str) -> DataError:
    return DataError(f"expected {_EXPECTED} in `{path}`; got {found}; {_REMEDY}")
