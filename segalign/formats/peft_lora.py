"""LoRA between PEFT adapters, diffusers' LoRA files and pairs by layer.

A diffusers folder holds ``pytorch_lora_weights.safetensors`` with keys
``unet.PATH.lora_A.weight`` (down) and ``unet.PATH.lora_B.weight`` (up), and loads into any pipeline
of the base model: ``pipe.load_lora_weights(FOLDER)``. Without a scale in the file it is 1.
"""

import re
from pathlib import Path
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from segalign.atomic import make_directory, write_bytes_atomic
from segalign.errors import DataError
from segalign.formats.lora_pairs import LoraPairs, check_layers, check_same_layers, lora_rank
from segalign.json_text import parse_json
from segalign.run_format import read_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"
_KEY = re.compile(r"unet\.(?P<path>.+)\.(?P<part>lora_A|lora_B|lora\.down|lora\.up)\.weight")
_DOWN = ("lora_A", "lora.down")


def lora_pairs(unet: nn.Module, adapter: str = "default") -> LoraPairs:
    """Take a copy of a network's adapter.

    Args:
        unet: A diffusers UNet with PEFT layers.
        adapter: Name of the adapter.

    Returns:
        Float32 CPU pairs without gradient, in ``modules()`` order, which is the official one for
        the official targets. A scale other than 1 is multiplied into ``up``.

    Raises:
        DataError: If there is no such adapter, or it is more than low-rank (DoRA, biases).
    """
    pairs = {}
    for path, layer in _adapter_layers(unet, adapter).items():
        up, down = _weights(layer, adapter)
        pairs[path] = _copied(up) * layer.scaling[adapter], _copied(down)
    return pairs


def fill_lora(unet: nn.Module, pairs: LoraPairs, adapter: str = "default") -> None:
    """Give an existing adapter of the same layers and rank new values, in place.

    Args:
        unet: A diffusers UNet with PEFT layers; parameters keep their type and device.
        pairs: The new values, of scale 1.
        adapter: Name of the adapter.

    Raises:
        DataError: If the layers or the rank differ; then nothing has been changed.
    """
    layers = _adapter_layers(unet, adapter)
    check_same_layers(layers, pairs, f"the adapter `{adapter}`")
    check_layers(pairs, unet)
    own, given = {layer.r[adapter] for layer in layers.values()}, lora_rank(pairs)
    if own != {given}:
        raise DataError(
            f"expected a LoRA of rank {', '.join(map(str, sorted(own)))}, the adapter's; got rank "
            f"{given}; set the adapter's `rank` to {given}"
        )
    with torch.no_grad():
        for path, layer in layers.items():
            up, down = _weights(layer, adapter)
            up.copy_(pairs[path][0] / layer.scaling[adapter])
            down.copy_(pairs[path][1])


def save_diffusers_lora(
    pairs: LoraPairs, folder: Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a LoRA that ``pipe.load_lora_weights(folder)`` takes, whole or not at all.

    Args:
        pairs: The pairs by layer; of a network with PEFT layers, those of `lora_pairs`.
        folder: Target; an existing LoRA in it is replaced.
        dtype: Type of the stored numbers.

    Returns:
        The file.

    Raises:
        DataError: If the pairs mix ranks.
        StorageError: If the file cannot be written.
    """
    lora_rank(pairs)
    named = {}
    for path, (up, down) in pairs.items():
        named[f"unet.{path}.lora_A.weight"] = _copied(down, dtype)
        named[f"unet.{path}.lora_B.weight"] = _copied(up, dtype)
    make_directory(folder)
    file = folder / LORA_FILE
    write_bytes_atomic(file, save(named, metadata={"format": "pt"}))
    return file


def load_diffusers_lora(path: Path, unet: nn.Module) -> LoraPairs:
    """Read a LoRA in diffusers' layout and check it against a network.

    Args:
        path: The file, or the folder that holds ``pytorch_lora_weights.safetensors``.
        unet: The network, for its structure only.

    Returns:
        Float32 CPU pairs; a scale other than 1 is multiplied into ``up``.

    Raises:
        DataError: If the file is damaged, of another layout or of another model.
    """
    file = path / LORA_FILE if path.is_dir() else path
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise _foreign(file, f"the key `{key}`")
        part = "down" if match["part"] in _DOWN else "up"
        halves.setdefault(match["path"], {})[part] = _copied(tensor)
    alone = next((layer for layer, parts in halves.items() if len(parts) != 2), None)
    if alone is not None:
        raise _foreign(file, f"half a pair of `{alone}`")
    pairs = {layer: (parts["up"], parts["down"]) for layer, parts in halves.items()}
    check_layers(pairs, unet)
    scale = _stored_scale(file, lora_rank(pairs))
    return {layer: (up * scale, down) for layer, (up, down) in pairs.items()}


def _adapter_layers(unet: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    layers = {
        path: module
        for path, module in unet.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    if not layers:
        raise DataError(
            f"expected a network with a LoRA adapter `{adapter}`; it has none; add one first"
        )
    for path, layer in layers.items():
        if adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None:
            raise DataError(
                f"expected a plain LoRA, up times down; layer `{path}` has more (DoRA, a bias); "
                "merge it into the weights instead"
            )
    return layers


def _weights(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """Return an adapter's own (up, down) of one layer."""
    up, down = layer.lora_B[adapter], layer.lora_A[adapter]
    return cast("nn.Linear", up).weight, cast("nn.Linear", down).weight


def _stored_scale(file: Path, rank: int) -> float:
    """Read the scale from PEFT's settings in a file's header; 1 if there are none."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
        settings = parse_json(header.get("lora_adapter_metadata", "{}"))
        own = {k.removeprefix("unet."): v for k, v in settings.items()}
        special = [
            name
            for name in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "lora_bias")
            if own.get(name)
        ]
        scale = float(own.get("lora_alpha", rank)) / rank
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise _foreign(file, f"a header that cannot be read ({error})") from error
    if special:
        raise _foreign(file, f"a LoRA with `{special[0]}`")
    return scale


def _copied(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _foreign(file: Path, found: str) -> DataError:
    return DataError(
        f"expected diffusers' LoRA of a UNet (`unet.LAYER.lora_A.weight`, ...) in `{file}`; "
        f"got {found}; convert it with diffusers first"
    )
