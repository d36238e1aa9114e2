"""How far adapters have moved a network."""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def lora_norm(network: nn.Module) -> Tensor | None:
    """Measure what adapters add to the weights: ``sqrt(sum ||s B A||_F^2)`` over all layers.

    The products are never formed: ``||B A||_F^2 = <B^T B, A A^T>``, matrices of rank x rank. They
    are those of the weights as they are, autocast or not.

    Args:
        network: Network with PEFT's LoRA layers. If they are sharded, all ranks must call this.

    Returns:
        A plain scalar, of float32 at least; None if there are no such layers.
    """
    squares = [
        _squared_norm(layer, name)
        for layer in network.modules()
        if isinstance(layer, LoraLayer)
        for name in layer.lora_A
    ]
    return torch.stack(squares).sum().clamp(min=0).sqrt() if squares else None


def _squared_norm(layer: LoraLayer, name: str) -> Tensor:
    down = _matrix(layer.lora_A[name])  # (r, in), of convolutions too
    up = _matrix(layer.lora_B[name])  # (out, r)
    # Autocast would multiply in bfloat16, and casts that it keeps may be older than the weights.
    with torch.autocast(down.device.type, enabled=False):
        product: Tensor = (up.mT @ up) * (down @ down.mT)
        squared: Tensor = product.sum() * layer.scaling[name] ** 2
    return squared.full_tensor() if isinstance(squared, DTensor) else squared


def _matrix(factor: nn.Module) -> Tensor:
    weight = factor.get_parameter("weight")
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
