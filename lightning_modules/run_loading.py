"""Build the module of a finished run, with its weights, for use without a trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from lightning_modules.class_paths import permitted_classes
from lightning_modules.generator_module import GeneratorModule
from lightning_modules.known_noise import without_known_noise
from lightning_modules.short_usage_parser import ShortUsageParser
from segalign.ema import TrainableEMA
from segalign.errors import ConfigError, DataError
from segalign.run_directory import resolve_checkpoint, stored_config, verify_checkpoint
from segalign.run_format import read_tensors
from segalign.trainable import trainable_parameters
from segalign.tree_codec import decode_tree


def load_module(
    path: Path, *, device: torch.device | str = "cpu", allow_import: Sequence[str] = ()
) -> pl.LightningModule:
    """Build a run's module from the config that its checkpoint carries, and fill in its weights.

    Args:
        path: A run, whose newest whole checkpoint is meant, or a checkpoint.
        device: Where the module is put.
        allow_import: Packages besides the usual ones whose classes the config may name.

    Returns:
        The module in evaluation mode, its raw weights in place. A stored average is its ``ema``.

    Raises:
        ConfigError: If there is no checkpoint, or its config does not fit this version.
        DataError: If the checkpoint is damaged, or its weights are of another model.
    """
    checkpoint = resolve_checkpoint(path)
    if checkpoint == path:
        verify_checkpoint(checkpoint)
    config = _read_config(checkpoint)
    module: pl.LightningModule = build_module(config["model"], allow_import)
    if isinstance(module, GeneratorModule):
        module.needs_objective = False
    # Frozen parts that a config calls random come from its seed, the same in every command.
    with without_known_noise(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(config.get("seed_everything") or 0))
        module.configure_model()
    _fill(module, checkpoint)
    _attach_average(module, checkpoint)
    return module.to(device).eval()


def build_module(settings: Mapping[str, Any], allow_import: Sequence[str] = ()) -> Any:
    """Instantiate a module from its part of a resolved config; nothing heavy is loaded.

    Args:
        settings: ``class_path`` and ``init_args``.
        allow_import: Packages besides the usual ones that may be named.

    Raises:
        ConfigError: If a setting does not fit, or a class of another package is named.
    """
    with permitted_classes(allow_import), without_known_noise():
        parser: LightningArgumentParser = ShortUsageParser(prog="main.py fit")
        parser.add_lightning_class_args(
            pl.LightningModule, "model", subclass_mode=True, required=True
        )
        parsed = parser.parse_object({"model": dict(settings)})
        return parser.instantiate_classes(parsed).model


def _read_config(checkpoint: Path) -> dict[str, Any]:
    """Read the config that a checkpoint carries."""
    config = decode_tree(stored_config(checkpoint) or {}, {})
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        raise ConfigError(
            f"expected the config of a run in `{checkpoint}`; got a checkpoint without one. "
            "Name a checkpoint that `main.py fit` has written."
        )
    return dict(config)


def _fill(module: pl.LightningModule, checkpoint: Path) -> None:
    """Load the stored weights: every trained one, and none that the module does not have."""
    stored = read_tensors(checkpoint / "model.safetensors")
    own = module.state_dict()
    wrong = sorted(
        {name for name in trainable_parameters(module) if name not in stored}
        | {name for name, tensor in stored.items() if _shape(own.get(name)) != tensor.shape}
    )
    if wrong:
        name = wrong[0]
        raise DataError(
            f"expected weights of `{type(module).__name__}` as configured in `{checkpoint}`; "
            f"`{name}` is {_spell(stored.get(name))} instead of {_spell(own.get(name))}. "
            "Use the version of segalign and the base model that the run was trained with."
        )
    module.load_state_dict(stored, strict=False)


def _attach_average(module: pl.LightningModule, checkpoint: Path) -> None:
    """Give the module its stored average, if there is one."""
    file = checkpoint / "ema.safetensors"
    if not file.is_file():
        return
    average = TrainableEMA(module)
    average.load_state_dict({"weights": read_tensors(file), "num_updates": 0})
    # Not through nn.Module's own registry: an average is no submodule.
    object.__setattr__(module, "ema", average)


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _spell(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
