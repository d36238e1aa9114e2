"""The structure of a base model's UNet, without its weights."""

from pathlib import Path
from typing import get_args

import torch
from diffusers import UNet2DConditionModel

from segalign.diffusion.model_sizes import Size, random_parts
from segalign.errors import ConfigError
from segalign.hub import fetch


def unet_structure(base: str) -> UNet2DConditionModel:
    """Build a model's UNet on the meta device: modules and shapes, no numbers.

    Args:
        base: ``sd15`` or another built-in size, for which nothing is read; or a folder or hub id
            in diffusers layout, of which only ``unet/config.json`` is read.

    Raises:
        ConfigError: If it is not there, or its config is not that of a UNet.
    """
    meta = torch.device("meta")
    for size in get_args(Size):
        if base == size:
            return random_parts(size, seed=0, device=meta).unet
    folder = fetch(base, what="the LoRA's base model", parts=("unet",))
    return _from_config(folder / "unet", meta)


def _from_config(folder: Path, device: torch.device) -> UNet2DConditionModel:
    try:
        with device:
            unet: UNet2DConditionModel = UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(folder)
            )
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"expected the config of a UNet in `{folder}`; got: {reason}; "
            "set `--base` to a model in diffusers layout, or to `sd15`"
        ) from error
    return unet
