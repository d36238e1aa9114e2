"""Which parts of a CLIP-type model preference training changes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPModel

from segalign.errors import ConfigError

# Every linear layer of attention and feed-forward blocks, of both towers.
LORA_TARGETS = r".*\.layers\.\d+\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@dataclass(frozen=True, kw_only=True)
class ScorerLora:
    """Low-rank adapters in place of trained blocks: no dropout, float32 weights.

    Args:
        rank: Rank r of every adapter; the scale is 1.
        target_modules: Regular expression of module names; the default takes all linear layers of
            the blocks of both towers.
    """

    rank: int = 16
    target_modules: str = LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"expected `lora.rank` of at least 1; got {self.rank}; try 16")

    def add_to(self, model: CLIPModel) -> None:
        """Add trainable adapters to a frozen model.

        Raises:
            ConfigError: If no module matches ``target_modules``.
        """
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            lora_dropout=0.0,
            target_modules=self.target_modules,
        )
        try:
            inject_adapter_in_model(config, model)
        except (ValueError, re.error) as error:
            raise ConfigError(
                f"expected `lora.target_modules` that match modules of the scorer; got "
                f"`{self.target_modules}`; leave it out for all linear layers of its blocks"
            ) from error
        for layer in _lora_layers(model):
            for adapter in (*layer.lora_A.values(), *layer.lora_B.values()):
                adapter.float()


@dataclass(frozen=True, kw_only=True)
class TrainedParts:
    """What is trained of a scorer; everything else is frozen.

    Args:
        image_blocks: Last blocks of the image tower that are trained, with its final norm and its
            projection; 0 freezes the tower, null trains all of it.
        text_blocks: The same of the text tower.
        logit_scale: Train the temperature too.
        lora: Train adapters instead of blocks; both towers' weights are frozen.
        gradient_checkpointing: Recompute the blocks' activations in the backward pass.
    """

    image_blocks: int | None = None
    text_blocks: int | None = None
    logit_scale: bool = True
    lora: ScorerLora | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.lora is not None and (self.image_blocks, self.text_blocks) != (None, None):
            raise ConfigError(
                "expected either `trained.lora` or numbers of blocks; got both; remove one"
            )
        if (self.image_blocks, self.text_blocks, self.logit_scale) == (0, 0, False):
            raise ConfigError(
                "expected `trained` to leave something to train; got 0 blocks of both towers and "
                "no temperature; raise one"
            )

    def apply(self, model: nn.Module) -> None:
        """Freeze and free the weights of a model, and add adapters.

        Args:
            model: A ``CLIPModel``; one of ``open_clip`` can only be trained whole.

        Raises:
            ConfigError: If a tower has fewer blocks, adapters fit nowhere, or the model is of
                another library and not to be trained whole.
        """
        if self.gradient_checkpointing:
            _checkpoint_blocks(model)
        model.requires_grad_(False)
        if self.lora is None and self.image_blocks is None and self.text_blocks is None:
            model.requires_grad_(True)
        elif not isinstance(model, CLIPModel):
            raise ConfigError(
                "expected a scorer in Hugging Face layout for `trained.lora` and numbers of "
                f"blocks; got `{type(model).__name__}`; leave them out"
            )
        elif self.lora is not None:
            self.lora.add_to(model)
        else:
            image_tower(model).train_last(self.image_blocks, "image_blocks")
            text_tower(model).train_last(self.text_blocks, "text_blocks")
        scale: Any = model.logit_scale
        scale.requires_grad_(self.logit_scale)


@dataclass(frozen=True, eq=False)
class TowerParts:
    """One tower: its transformer, its blocks, and what comes after them."""

    transformer: nn.Module
    blocks: Iterable[nn.Module]
    after: tuple[nn.Module, ...]

    def train_last(self, count: int | None, setting: str) -> None:
        """Free the last blocks and what follows; None frees all, 0 nothing.

        Raises:
            ConfigError: If there are fewer blocks.
        """
        blocks = list(self.blocks)
        if count is not None and not 0 <= count <= len(blocks):
            raise ConfigError(
                f"expected `trained.{setting}` from 0 to {len(blocks)}, the tower's blocks; got "
                f"{count}; null trains the whole tower"
            )
        if count == 0:
            return
        freed = [self.transformer] if count is None else blocks[len(blocks) - count :]
        for part in (*freed, *self.after):
            part.requires_grad_(True)


def image_tower(model: CLIPModel) -> TowerParts:
    """Return the parts of the image tower."""
    tower: Any = model.vision_model
    after = (tower.post_layernorm, model.visual_projection)
    return TowerParts(tower, tower.encoder.layers, after)


def text_tower(model: CLIPModel) -> TowerParts:
    """Return the parts of the text tower."""
    tower: Any = model.text_model
    after = (tower.final_layer_norm, model.text_projection)
    return TowerParts(tower, tower.encoder.layers, after)


def _checkpoint_blocks(model: nn.Module) -> None:
    # Its names in newer and older versions of transformers, and in open_clip.
    for name, argument in (
        ("activation_checkpointing_enable", {"use_reentrant": False}),
        ("gradient_checkpointing_enable", {"use_reentrant": False}),
        ("set_grad_checkpointing", True),
    ):
        if (enable := getattr(model, name, None)) is not None:
            enable(argument)
            return
    raise ConfigError(
        "expected a scorer that can recompute activations for `gradient_checkpointing`; got "
        f"`{type(model).__name__}`; set it to false"
    )


def merge_adapters(model: nn.Module) -> None:
    """Fold all adapters into the weights that they change; the model is as it was built, tuned."""
    for layer in list(_lora_layers(model)):
        layer.merge()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                setattr(parent, name, child.get_base_layer())


def _lora_layers(model: nn.Module) -> Iterable[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))
