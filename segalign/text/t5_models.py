"""T5 encoders: pretrained ones from the hub or a folder, and random ones of known sizes."""

from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from segalign.errors import ConfigError
from segalign.hub import fetch
from segalign.json_text import parse_json

T5Size = Literal["large", "tiny"]

_WHAT = "the T5 model"
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_LOADING_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
_SHAPES: Final[dict[T5Size, dict[str, Any]]] = {
    # T5 1.0 large, as `google-t5/t5-large`.
    "large": {
        "vocab_size": 32_128,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 4096,
        "num_layers": 24,
        "num_heads": 16,
        "feed_forward_proj": "relu",
        "dropout_rate": 0.1,
    },
    "tiny": {
        "vocab_size": 384,
        "d_model": 48,
        "d_kv": 12,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "relu",
        "dropout_rate": 0.1,
    },
}


def load_t5(
    model: str,
    *,
    init: Literal["pretrained", "random"] = "pretrained",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """Make a frozen T5 encoder and its tokenizer.

    Args:
        model: Pretrained: hub id or local folder (``config.json``, safetensors, and
            ``tokenizer.json`` or ``spiece.model``). Random: the size, ``large`` or ``tiny``; a hub
            id that ends in ``t5-large`` means ``large``.
        init: ``random`` reads and downloads nothing.
        dtype: Precision of the weights.
        seed: Seed of random weights.

    Returns:
        The model, frozen, in evaluation mode, on the CPU; and the tokenizer.

    Raises:
        ConfigError: If it is not there, is not a T5 model, or a file is missing or damaged.
    """
    if init == "random":
        encoder = random_t5(_size(model), seed=seed)
        nn.Module.to(encoder, dtype=dtype)
        return encoder, byte_t5_tokenizer()
    return _read_model(fetch(model, what=_WHAT), dtype)


def random_t5(size: T5Size, *, seed: int = 0) -> T5EncoderModel:
    """Build a frozen T5 encoder with random weights, float32, in evaluation mode.

    Under ``with torch.device("meta")`` it has shapes alone, at no cost.

    Args:
        size: ``large`` has 334.9 M parameters and width 1024; ``tiny`` width 48.
        seed: Seed of the weights; the process's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = T5EncoderModel(T5Config(**_SHAPES[size]))
    return _freeze(model)


def byte_t5_tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer with T5's interface that needs no files: one token for each UTF-8 byte.

    Returns:
        A tokenizer of 259 entries; padding 0, ``</s>`` 1, as T5's.
    """
    return ByT5Tokenizer(extra_ids=0, model_max_length=512)


def _size(model: str) -> T5Size:
    """Read the size of a random model from its name."""
    if model == "tiny":
        return "tiny"
    if model == "large" or model.rpartition("/")[2] == "t5-large":
        return "large"
    raise ConfigError(
        f"expected `large`, `tiny` or a hub id of T5-large for a random T5 model; got `{model}`; "
        "choose one of them, or set `init` to `pretrained`"
    )


def _read_model(folder: Path, dtype: torch.dtype) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """Read a model in transformers' layout."""
    try:
        _check_files(folder)
        loaded: Any = T5EncoderModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ConfigError:
        raise
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise _refused(folder, f"{type(error).__name__}: {reason}") from error
    encoder, info = loaded
    lost = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if lost:
        raise _refused(folder, f"no weight of the right shape for `{lost[0]}` ({len(lost)} in all)")
    return _freeze(encoder), tokenizer


def _freeze(model: T5EncoderModel) -> T5EncoderModel:
    model.requires_grad_(False)
    model.train(False)
    return model


def _check_files(folder: Path) -> None:
    """Refuse what transformers would fill in silently: another type's config, no vocabulary."""
    kind = parse_json((folder / "config.json").read_bytes()).get("model_type")
    if kind != "t5":
        raise _refused(folder, f"a model of type `{kind}`")
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "ByT5" in parse_json(settings.read_bytes()).get(
        "tokenizer_class", ""
    ):
        return
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise _refused(folder, "neither `tokenizer.json` nor `spiece.model`")


def _refused(folder: Path, found: str) -> ConfigError:
    return ConfigError(
        f"expected {_WHAT} with config, safetensors and tokenizer in `{folder}`; got {found}; "
        "download the whole model, for example `google-t5/t5-large`"
    )
