"""Weights of the tiny models: from the package, from runs, and compact on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segalign.errors import ConfigError, DataError, SegalignError
from segalign.run_directory import resolve_checkpoint
from segalign.text.tokenizer import VOCAB_SIZE

_EMBEDDING = "token_embedding.weight"


def shipped_folder() -> Path:
    """Return the folder of the weights in the package."""
    return Path(__file__).parent / "weights"


def read_weights(
    source: str, part: str, prefixes: Sequence[str], world: str
) -> dict[str, Tensor] | None:
    """Find the weights that a setting names.

    Args:
        source: ``shipped``, ``random``, or a run or checkpoint.
        part: Name of the part, which is its file's.
        prefixes: Where the part may stand in a run's module.
        world: World of the model.

    Returns:
        Float32 tensors by name; None for ``random``.

    Raises:
        ConfigError: If nothing is shipped for this world, or the run does not exist.
        DataError: If the run does not hold the part.
    """
    if source == "random":
        return None
    if source != "shipped":
        return _run_weights(Path(source), part, prefixes)
    file = shipped_folder() / f"{part}.safetensors"
    if world != "3x3" or not file.is_file():
        raise ConfigError(
            f"expected shipped weights of `{part}` for world `{world}`; there are none. "
            "Set it to `random` or to a run directory."
        )
    return load_compact(file)


def _run_weights(path: Path, part: str, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Read a run's newest checkpoint; averaged tensors win over raw ones."""
    try:
        checkpoint = resolve_checkpoint(path)
    except SegalignError as error:
        raise ConfigError(
            f"expected a run of {part} weights at `{path}`; found no checkpoint. "
            "Run its recipe in configs/scenes first."
        ) from error
    state = load_file(checkpoint / "model.safetensors")
    averages = checkpoint / "ema.safetensors"
    if averages.is_file():
        state |= load_file(averages)
    for prefix in prefixes:
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if found:
            return found
    raise DataError(
        f"expected tensors named {' or '.join(f'`{p}*`' for p in prefixes)} in `{checkpoint}`; "
        f"got `{next(iter(state), 'none')}`. Name a run of the right recipe."
    )


def fill_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that has to fit exactly.

    Raises:
        DataError: If a tensor is missing, superfluous or of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != theirs:
        name = min(set(own.items()) ^ set(theirs.items()))[0]
        raise DataError(
            f"expected weights of {type(model).__name__} in `{source}`; `{name}` is "
            f"{theirs.get(name, 'missing')} instead of {own.get(name, 'absent')}. Check the world "
            "and the run."
        )
    model.load_state_dict(dict(state))


def save_compact(state: Mapping[str, Tensor], file: Path, used_rows: Tensor) -> None:
    """Write weights in float16, of a token embedding only the rows that are used.

    Whole numbers stay what they are.

    Args:
        state: Weights by name.
        file: Target.
        used_rows: Token ids that occur, int64.
    """
    compact: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_EMBEDDING):
            compact[f"{name}.rows"] = tensor[used_rows].half().contiguous()
            compact[f"{name}.ids"] = used_rows
        elif tensor.is_floating_point():
            compact[name] = tensor.detach().half().contiguous()
        else:
            compact[name] = tensor
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(compact, file)


def load_compact(file: Path) -> dict[str, Tensor]:
    """Read what `save_compact` wrote, as float32; embedding rows that were left out are zero."""
    state = load_file(file)
    for name in [name for name in state if name.endswith(".rows")]:
        rows = state.pop(name)
        whole = torch.zeros(VOCAB_SIZE, rows.shape[1])
        whole[state.pop(name.removesuffix("rows") + "ids")] = rows.float()
        state[name.removesuffix(".rows")] = whole
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
