"""The benchmark's base model: a stand-in for Stable Diffusion 1.5 that fits in the repository.

It was trained on captions of at most 77 tokens, and has never seen more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from segalign.diffusion.bundle import DiffusionBundle
from segalign.diffusion.latents import PixelUnshuffleCodec
from segalign.diffusion.schedule import NoiseSchedule
from segalign.errors import ConfigError, DataError
from segalign.run_directory import resolve_checkpoint
from segalign.scenes.models import (
    SCHEDULER_CONFIG,
    UNSHUFFLE_FACTOR,
    VOCABULARY_SIZE,
    generator_unet,
    scorer_model,
)
from segalign.scenes.world import get_world
from segalign.text.tokenizer import clip_tokenizer

GENERATOR_FILE, SCORER_FILE = "generator.safetensors", "scorer.safetensors"
_EMBEDDING = "text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True, kw_only=True)
class ScenesBase:
    """The scenes model, as shipped, from runs, or untrained.

    Args:
        world: World of the images; the shipped weights are of ``3x3``.
        generator: ``shipped``, ``random``, or a run (or checkpoint) of the diffusion module whose
            network is used, averaged weights preferred.
        scorer: ``shipped``, ``random``, or a run of the scorer whose text model is used.
    """

    world: str = "3x3"
    generator: str = "shipped"
    scorer: str = "shipped"

    def load(self) -> DiffusionBundle:
        """Build the model and read its weights.

        Raises:
            ConfigError: If the world or a run does not exist.
            DataError: If weights are missing or of another network.
        """
        world = get_world(self.world)
        unet = generator_unet(world)
        self._fill(unet, self.generator, "generator", "unet.")
        scorer = load_scorer(self.world, self.scorer)
        return DiffusionBundle(
            unet=unet,
            text_model=scorer.text_model,
            tokenizer=clip_tokenizer(),
            codec=PixelUnshuffleCodec(UNSHUFFLE_FACTOR),
            schedule=NoiseSchedule.from_config(SCHEDULER_CONFIG),
            image_size=world.image_size,
        )

    def _fill(self, model: nn.Module, source: str, part: str, prefix: str) -> None:
        state = read_weights(source, part, prefix, self.world)
        if state is not None:
            fill_weights(model, state, source)


def load_scorer(world: str, source: str) -> CLIPModel:
    """Build the scorer and read its weights (``shipped``, ``random`` or a run)."""
    model = scorer_model(get_world(world))
    state = read_weights(source, "scorer", "model.", world)
    if state is not None:
        fill_weights(model, state, source)
    return model


def read_weights(
    source: str, part: Literal["generator", "scorer"] | str, prefix: str, world: str
) -> dict[str, Tensor] | None:
    """Find the weights that a setting names.

    Returns:
        Float32 tensors by name; None for ``random``.
    """
    if source == "random":
        return None
    if source != "shipped":
        return _run_weights(Path(source), prefix)
    file = shipped_folder() / f"{part}.safetensors"
    if world != "3x3" or not file.is_file():
        raise ConfigError(
            f"expected shipped weights of `{part}` for world `{world}`; there are none. "
            "Set it to `random` or to a run directory."
        )
    return expand_rows({name: tensor.float() for name, tensor in load_file(file).items()})


def shipped_folder() -> Path:
    """Return the folder of the weights in the package."""
    return Path(__file__).parent / "weights"


def _run_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read a run's newest checkpoint; averaged tensors win over raw ones."""
    checkpoint = resolve_checkpoint(path)
    state = load_file(checkpoint / "model.safetensors")
    averages = checkpoint / "ema.safetensors"
    if averages.is_file():
        loaded = load_file(averages)
        state |= {name.split("weights/", 1)[-1]: tensor for name, tensor in loaded.items()}
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def fill_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that has to fit exactly.

    Raises:
        DataError: If a tensor is missing, superfluous or of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != theirs:
        name = sorted(set(own.items()) ^ set(theirs.items()))[0][0]
        raise DataError(
            f"expected weights of {type(model).__name__} in `{source}`; `{name}` is "
            f"{theirs.get(name, 'missing')} instead of {own.get(name, 'absent')}. Check the world "
            "and the run."
        )
    model.load_state_dict(dict(state))


def save_compact(state: Mapping[str, Tensor], file: Path, used_rows: Tensor) -> None:
    """Write weights in float16, of the token embedding only the rows that are used.

    Args:
        state: Weights by name.
        file: Target.
        used_rows: Token ids that occur, int64.
    """
    compact = {name: tensor.detach().half().contiguous() for name, tensor in state.items()}
    if _EMBEDDING in compact:
        compact[f"{_EMBEDDING}.rows"] = compact.pop(_EMBEDDING)[used_rows].contiguous()
        compact[f"{_EMBEDDING}.ids"] = used_rows
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(compact, file)


def expand_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo the sparse storage of the token embedding: rows that were left out are zero."""
    rows = state.pop(f"{_EMBEDDING}.rows", None)
    if rows is not None:
        ids = state.pop(f"{_EMBEDDING}.ids").long()
        embedding = torch.zeros(VOCABULARY_SIZE, rows.shape[1])
        embedding[ids] = rows
        state[_EMBEDDING] = embedding
    return state
