"""Low-rank updates by layer name, whatever file or adapter they come from."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from segalign.errors import DataError

# Layer path -> (up, down). The update of the layer's weight is up @ down, so the scale is 1.
# Linear: up (out, r), down (r, in). Convolution: up (out, r, 1, 1), down (r, in, k, k).
LoraPairs = Mapping[str, tuple[Tensor, Tensor]]
Shape = tuple[int, ...]


def pair_shapes(weight_shape: Sequence[int], rank: int) -> tuple[Shape, Shape]:
    """Return the shapes of (up, down) that a weight of this shape needs."""
    out, *rest = weight_shape
    return (out, rank, *(1 for _ in rest[1:])), (rank, *rest)


def lora_rank(pairs: LoraPairs) -> int:
    """Return the rank that all pairs share.

    Raises:
        DataError: If there are several, or no pairs.
    """
    ranks = Counter(down.shape[0] for _, down in pairs.values())
    if len(ranks) != 1:
        found = ", ".join(f"rank {rank} in {count} layers" for rank, count in sorted(ranks.items()))
        raise DataError(
            f"expected a LoRA of one rank; got {found or 'no layers'}; use a file of one training"
        )
    return next(iter(ranks))


def merge_lora(unet: nn.Module, loras: LoraPairs | Sequence[LoraPairs], scale: float = 1.0) -> None:
    """Add low-rank updates to a network's weights, in place, as `add_pairs` does.

    Args:
        unet: The network; under PEFT layers their base layers are changed.
        loras: Pairs of one LoRA, or of several.
        scale: Factor on every update.

    Raises:
        DataError: If a layer is missing or of another shape; then nothing has been changed.
    """
    several = [loras] if isinstance(loras, Mapping) else list(loras)
    layers = plain_layers(unet)
    for pairs in several:
        check_layers(pairs, unet)
    with torch.no_grad():
        for path in {path: None for pairs in several for path in pairs}:
            weight = layers[path].weight
            weight.copy_(add_pairs(weight, [p[path] for p in several if path in p], scale))


def add_pairs(weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], scale: float = 1.0) -> Tensor:
    """Add low-rank updates to a weight.

    The sum of all updates is formed in float32 (or wider, if the weight is) and rounded to the
    weight's type once. Merging one after the other in bfloat16, as the official code does, loses
    up to 1 % of an update. Autocast makes no difference.

    Args:
        weight: Of a linear layer or a convolution; not changed.
        pairs: Its (up, down), at least one.
        scale: Factor on every update.

    Returns:
        A new tensor of the weight's shape and type; no gradient.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        updates = torch.stack([_update(pair, weight, wide) for pair in pairs])
        return (weight.to(wide) + scale * updates.sum(dim=0)).to(weight.dtype)


def check_layers(pairs: LoraPairs, unet: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Check that a network has the layers of all pairs, in their shapes.

    Returns:
        The network's layers by path.

    Raises:
        DataError: If a layer is missing or of another shape.
    """
    layers = plain_layers(unet)
    for path, (up, down) in pairs.items():
        if path not in layers:
            raise DataError(
                f"expected a LoRA for layers of this UNet; it has no layer `{path}`; "
                "choose the LoRA's own base model"
            )
        check_shapes(up, down, layers[path].weight.shape, f"layer `{path}`")
    return layers


def check_shapes(up: Tensor, down: Tensor, weight_shape: Sequence[int], place: str) -> None:
    """Check that a pair, of whatever rank, fits a weight.

    Raises:
        DataError: If it does not; the message names the place.
    """
    found = tuple(up.shape), tuple(down.shape)
    expected = pair_shapes(weight_shape, max([1, *found[1][:1]]))
    if found != expected:
        raise DataError(
            f"expected up {expected[0]} and down {expected[1]} at {place}; "
            f"got {found[0]} and {found[1]}; choose the LoRA's own base model"
        )


def check_same_layers(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Check that a LoRA covers exactly these layers.

    Raises:
        DataError: If one is missing or superfluous.
    """
    wanted, given = set(expected), set(found)
    if wanted != given:
        name = min(wanted ^ given)
        state = "is missing" if name in wanted else "is superfluous"
        raise DataError(
            f"expected a LoRA of the {len(wanted)} layers of {where}; got {len(given)} layers, "
            f"`{name}` {state}; use one that was trained on the same layers"
        )


def plain_layers(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear | nn.Conv2d]:
    """Find the linear layers and convolutions in ``modules()`` order.

    PEFT layers count as the layer that they wrap, under its path; their own parts do not count.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    inside = "\0"  # no path starts with it
    for path, part in module.named_modules(prefix=prefix):
        if path.startswith(inside):
            continue
        layer = part
        if isinstance(part, BaseTunerLayer):
            inside, layer = f"{path}.", part.get_base_layer()
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found[path] = layer
    return found


def _update(pair: tuple[Tensor, Tensor], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute up @ down in a weight's shape."""
    up, down = (part.to(weight.device, dtype).flatten(1) for part in pair)
    return (up @ down).reshape(weight.shape)
