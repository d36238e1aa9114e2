"""The adapter that maps T5's features to the width of a generator, and its official files.

Dims: B captions, S tokens of a caption.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import __version__ as diffusers_version
from diffusers.models.attention import FeedForward
from safetensors.torch import save_file
from torch import Tensor, nn

from segalign.errors import ConfigError, DataError
from segalign.formats.folders import new_folder
from segalign.hub import fetch
from segalign.json_text import parse_json
from segalign.run_format import read_tensors
from segalign.tensor_pickle import is_plain_tensor, read_tensor_pickle

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"

_WHAT = "the text adapter"
_DIMS = ("in_dim", "int_dim", "out_dim")
_MAX_DIM = 65_536
# In LaVi-Bridge's release, in a run's export, and as LongSD names a step's (`s28750_adapter`).
_SUB_FOLDERS = ("t5_unet/adapter", "adapter", "*_adapter")
# What wrappers put before all names: data-parallel training, and our own `T5Encoder`.
_PREFIXES = ("module.", "adapter.")
_EXPECTED = "the 12 tensors of a text adapter"
_REMEDY = "choose a LaVi-Bridge or LongSD adapter, or download it again"


class TextAdapter(nn.Module):
    """Two gated feed-forward layers behind layer norms: ``y = FF2(LN2(FF1(LN1(x))))``.

    A feed-forward layer of width d is a GEGLU of inner width 4d and a linear layer. There is no
    residual connection. Parameters are float32 and named as in LaVi-Bridge.

    Args:
        in_dim: Width of the input (T5-large: 1024).
        int_dim: Width between the two layers (LaVi-Bridge: 896).
        out_dim: Width of the output, the generator's (Stable Diffusion 1.5: 768).
        dropout: Rate between GEGLU and linear layer. The official code trains with 0.1.

    Reference: LaVi-Bridge, arXiv 2403.07860; 21.25 M parameters in its shape.
    """

    def __init__(self, in_dim: int, int_dim: int, out_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_dim, self.int_dim, self.out_dim = in_dim, int_dim, out_dim
        self.ff1 = FeedForward(in_dim, int_dim, dropout=dropout)
        self.ff2 = FeedForward(int_dim, out_dim, dropout=dropout)
        self.norm1 = nn.LayerNorm(in_dim)
        self.norm2 = nn.LayerNorm(int_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features, ``(B, S, in_dim)`` of any float dtype, to ``(B, S, out_dim)``.

        The result has the dtype of the adapter's weights, or autocast's. Gradients flow into the
        weights and the features.
        """
        features = features.to(self.norm1.weight.dtype)
        mapped: Tensor = self.ff2(self.norm2(self.ff1(self.norm1(features))))
        return mapped


def check_adapter_widths(
    adapter: TextAdapter, *, t5_width: int, generator_width: int | None = None
) -> None:
    """Check that an adapter fits between a T5 model and a generator.

    Args:
        adapter: The adapter.
        t5_width: Width of T5's features.
        generator_width: Width of the features that the generator attends to; None checks T5 only.

    Raises:
        ConfigError: If a width differs.
    """
    if adapter.in_dim != t5_width:
        raise ConfigError(
            f"expected an adapter of input width {t5_width}, the T5 model's; got {adapter.in_dim}; "
            "choose the T5 model that the adapter was trained with"
        )
    if generator_width is not None and adapter.out_dim != generator_width:
        raise ConfigError(
            f"expected an adapter of output width {generator_width}, the generator's; got "
            f"{adapter.out_dim}; choose the generator that the adapter was trained with"
        )


def load_adapter(source: str | Path, *, dropout: float = 0.0) -> TextAdapter:
    """Read an adapter of LaVi-Bridge or LongSD; no code in its files can run.

    Args:
        source: Local folder or hub id. ``config.json`` (``in_dim``, ``int_dim``, ``out_dim``) and
            ``diffusion_pytorch_model.safetensors`` or ``.bin`` lie in it, in its ``adapter/``, in
            ``t5_unet/adapter/`` or in its only ``*_adapter/``.
        dropout: Rate in training; the files do not hold it.

    Returns:
        The adapter in float32, trainable, in evaluation mode.

    Raises:
        ConfigError: If it is not there.
        DataError: If a file is damaged, or is not that of such an adapter.
    """
    folder = _find_folder(source)
    dims = _read_dims(folder / CONFIG_FILE)
    with torch.device("meta"):
        adapter = TextAdapter(*dims, dropout=dropout)
    path, tensors = _read_weights(folder)
    _check_tensors(tensors, adapter, path)
    adapter.load_state_dict({name: tensors[name] for name in adapter.state_dict()}, assign=True)
    return adapter.float().eval()


def save_adapter(adapter: TextAdapter, folder: Path) -> None:
    """Write an adapter in the official layout, float32, whole or not at all.

    Args:
        adapter: The adapter.
        folder: New folder; its parents are created.

    Raises:
        ConfigError: If the folder has content.
        StorageError: If it cannot be written.
    """
    config = {
        "_class_name": "TextAdapter",
        "_diffusers_version": diffusers_version,
        **{name: getattr(adapter, name) for name in _DIMS},
    }
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in adapter.state_dict().items()
    }
    with new_folder(folder) as temporary:
        text = json.dumps(config, indent=2) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})


def _find_folder(source: str | Path) -> Path:
    """Find the folder that holds the files themselves."""
    files = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE)
    wanted = [PICKLED_FILE, *(f"{part}/{name}" for part in _SUB_FOLDERS for name in files)]
    root = fetch(str(source), what=_WHAT, also=wanted)
    if (root / CONFIG_FILE).is_file():
        return root
    for pattern in _SUB_FOLDERS:
        found = sorted(path.parent for path in root.glob(f"{pattern}/{CONFIG_FILE}"))
        if len(found) > 1:
            names = ", ".join(f"`{path.name}`" for path in found)
            raise ConfigError(
                f"expected one adapter in `{root}`; got {names}; set `adapter` to the folder of one"
            )
        if found:
            return found[0]
    raise ConfigError(
        f"expected {_WHAT} with `{CONFIG_FILE}` and `{WEIGHTS_FILE}` in `{root}` or its "
        f"`adapter/`; found no `{CONFIG_FILE}`; download the whole adapter folder"
    )


def _read_dims(path: Path) -> list[int]:
    """Read the three widths from a config."""
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected JSON in `{path}`; got {type(error).__name__}; download the adapter again"
        ) from error
    dims: list[Any] = [config.get(name) for name in _DIMS] if isinstance(config, dict) else []
    if not dims or not all(type(dim) is int and 0 < dim <= _MAX_DIM for dim in dims):
        raise DataError(
            f"expected `in_dim`, `int_dim`, `out_dim` from 1 to {_MAX_DIM} in `{path}`; got "
            f"{dims or type(config).__name__}; choose the folder of a LaVi-Bridge or LongSD adapter"
        )
    return dims


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read the tensors by name, without a wrapper's prefix; return the file too."""
    path = folder / WEIGHTS_FILE
    if path.is_file():
        named: Any = read_tensors(path)
    elif (folder / PICKLED_FILE).is_file():
        path = folder / PICKLED_FILE
        named = read_tensor_pickle(path, expected=_EXPECTED, remedy=_REMEDY)
    else:
        raise ConfigError(
            f"expected {_WHAT}'s `{WEIGHTS_FILE}` (or `.bin`) in `{folder}`; found none; "
            "download the whole adapter folder"
        )
    if not isinstance(named, Mapping) or not all(
        isinstance(name, str) and is_plain_tensor(value) for name, value in named.items()
    ):
        _refuse(path, f"a {type(named).__name__} of other things")
    for prefix in _PREFIXES:
        if named and all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return path, dict(named)


def _check_tensors(tensors: Mapping[str, Tensor], adapter: TextAdapter, path: Path) -> None:
    """Compare tensors with the parameters that the config promises."""
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    if missing := sorted(expected.keys() - tensors.keys()):
        _refuse(path, f"none named `{missing[0]}` ({len(missing)} missing)")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        _refuse(path, f"an unexpected `{unexpected[0]}` ({len(unexpected)} in all)")
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            _refuse(path, f"`{name}` of shape {found}, where `{CONFIG_FILE}` says {shape}")
        if not tensors[name].is_floating_point() or not tensors[name].isfinite().all():
            _refuse(path, f"`{name}` with other things than finite numbers")


def _refuse(path: Path, found: str) -> NoReturn:
    raise DataError(f"expected {_EXPECTED} in `{path}`; got {found}; {_REMEDY}")
