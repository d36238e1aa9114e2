"""The official LoRA file (``lora_vis.pt``): a bare list of tensors, told apart by position alone.

The list is ``[up, down, up, down, ...]`` in float16, without names, rank or scale (which is 1).
Position i belongs to the i-th linear layer or convolution below a ResnetBlock2D, Attention or
GEGLU module, in the order of ``modules()``: down, up, mid; attentions before resnets; 224 layers
for Stable Diffusion 1.5.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segalign.atomic import make_directory, write_bytes_atomic
from segalign.errors import DataError
from segalign.formats.lora_pairs import (
    LoraPairs,
    Shape,
    check_layers,
    check_same_layers,
    check_shapes,
    lora_rank,
    pair_shapes,
    plain_layers,
)
from segalign.run_format import read_tensors
from segalign.tensor_pickle import is_plain_tensor, read_tensor_pickle

_OWNERS = frozenset({"ResnetBlock2D", "Attention", "CrossAttention", "GEGLU"})
_EXPECTED = "a list of LoRA tensors [up, down, ...]"
_REMEDY = "choose an official LoRA file (`lora_vis.pt`)"


@dataclass(frozen=True)
class LoraTarget:
    """One layer that the official LoRA adapts.

    Attributes:
        path: Its name in the UNet.
        kind: ``linear`` or ``conv``.
        weight_shape: ``(out, in)`` or ``(out, in, k, k)``.
    """

    path: str
    kind: Literal["linear", "conv"]
    weight_shape: Shape

    def pair_shapes(self, rank: int) -> tuple[Shape, Shape]:
        """Return the shapes of (up, down) for a rank."""
        return pair_shapes(self.weight_shape, rank)


def official_targets(unet: nn.Module) -> list[LoraTarget]:
    """List the layers that the official LoRA adapts, in the order of its file.

    Args:
        unet: A diffusers UNet, which may be on the meta device or carry PEFT layers.
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for path, module in unet.named_modules():
        if type(module).__name__ in _OWNERS:
            layers.update(plain_layers(module, prefix=path))
    return [
        LoraTarget(
            path,
            "conv" if isinstance(layer, nn.Conv2d) else "linear",
            tuple(layer.weight.shape),
        )
        for path, layer in layers.items()
    ]


def read_official_lora(path: Path) -> list[Tensor]:
    """Read the tensors of an official LoRA file. No code in it can run.

    Args:
        path: A ``torch.save`` file of a list, or safetensors with keys ``000.up``, ``001.down``...

    Returns:
        Float32 CPU tensors ``[up, down, up, down, ...]`` that carry no gradient.

    Raises:
        DataError: If the file is missing, damaged, no such list, or holds anything but tensors.
    """
    if not path.is_file():
        raise DataError(f"expected a LoRA file at `{path}`; there is none; check the path")
    if path.suffix == ".safetensors":
        content: Any = _read_named(path)
    else:
        content = read_tensor_pickle(path, expected=_EXPECTED, remedy=_REMEDY)
    if not isinstance(content, list) or not content or not all(map(_is_plain, content)):
        raise _not_a_list(path, _describe(content))
    if len(content) % 2:
        raise _not_a_list(path, f"{len(content)} tensors, an odd number")
    tensors = [tensor.detach().to("cpu", torch.float32, copy=True) for tensor in content]
    for position, tensor in enumerate(tensors):
        if not tensor.isfinite().all():
            raise DataError(
                f"expected finite numbers in `{path}`; tensor {position} has others; "
                "use an earlier checkpoint"
            )
    return tensors


def match_official_lora(tensors: Sequence[Tensor], unet: nn.Module) -> LoraPairs:
    """Give every pair of a positional list its layer.

    Args:
        tensors: ``[up, down, up, down, ...]``, of any one rank.
        unet: The UNet, for its structure only.

    Returns:
        The pairs by layer, in the official order.

    Raises:
        DataError: If the list belongs to another model, or mixes ranks.
    """
    targets = official_targets(unet)
    if len(tensors) != 2 * len(targets):
        raise DataError(
            f"expected {2 * len(targets)} LoRA tensors for the {len(targets)} layers of this "
            f"UNet; got {len(tensors)}; choose the LoRA's own base model"
        )
    pairs = {}
    for position, target in enumerate(targets):
        up, down = tensors[2 * position], tensors[2 * position + 1]
        check_shapes(up, down, target.weight_shape, f"position {position} (`{target.path}`)")
        pairs[target.path] = up, down
    lora_rank(pairs)
    return pairs


def write_official_lora(pairs: LoraPairs, unet: nn.Module, path: Path) -> None:
    """Write an official LoRA file, whole or not at all; an existing one is replaced.

    Args:
        pairs: The pairs by layer, in any order.
        unet: The UNet, for the layers and their order.
        path: Target, usually ``lora_vis.pt``.

    Raises:
        DataError: If the pairs are not those of the official layers, mix ranks, or are too large
            for float16.
        StorageError: If the file cannot be written.
    """
    targets = official_targets(unet)
    check_same_layers((target.path for target in targets), pairs, "the official LoRA")
    check_layers(pairs, unet)
    lora_rank(pairs)
    tensors = [_half(part, target.path) for target in targets for part in pairs[target.path]]
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    make_directory(path.parent)
    write_bytes_atomic(path, buffer.getvalue())


def _half(tensor: Tensor, path: str) -> Tensor:
    half = tensor.detach().to("cpu", torch.float16, copy=True).contiguous()
    if not half.isfinite().all():
        raise DataError(
            f"expected LoRA numbers within float16 (65504), which official files hold; "
            f"`{path}` exceeds it; export to another format"
        )
    return half


def _read_named(path: Path) -> list[Tensor]:
    named = read_tensors(path)
    expected = [f"{index:03d}.{'down' if index % 2 else 'up'}" for index in range(len(named))]
    if sorted(named) != sorted(expected):
        name = min(set(named) ^ set(expected))
        raise _not_a_list(path, f"keys other than `000.up`, `001.down`, ... (`{name}`)")
    return [named[name] for name in expected]


def _is_plain(item: object) -> bool:
    return isinstance(item, Tensor) and is_plain_tensor(item) and item.is_floating_point()


def _describe(content: object) -> str:
    if isinstance(content, list) and content:
        position = next(i for i, item in enumerate(content) if not _is_plain(item))
        return f"a list with a {type(content[position]).__name__} of another kind at {position}"
    return f"a {type(content).__name__}" + (" of no tensors" if content == [] else "")


def _not_a_list(path: Path, found: str) -> DataError:
    return DataError(f"expected {_EXPECTED} in `{path}`; got {found}; {_REMEDY}")
