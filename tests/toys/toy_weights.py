"""Weight files of real networks, drawn instead of trained."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

SIDES = ((299, 299), (36, 64))


def drawn_state(network: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """He-normal convolutions, norms near one; small enough for features of a usual size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            return noise * (2 / tensor[0].numel()) ** 0.5
        return noise * 0.1 + (0 if name.endswith(("bias", "mean")) else 1)

    return {name: draw(name, tensor) for name, tensor in network.state_dict().items()}


def write_weights(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def pixels_of(count: int, height: int, width: int, seed: int = 1) -> torch.Tensor:
    """Smooth images with grain, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    grain = 0.1 * torch.randn(smooth.shape, generator=generator)
    return ((smooth + grain).clamp(0, 1) * 255).round().to(torch.uint8)
