"""LoRA on the generator, by PEFT: no dropout, float32 weights over a frozen base.

The official code trains LoRA weights in the base's bfloat16, where AdamW at a rate of 3e-5 moves
one entry in five; here they are float32 whatever the base is.
"""

from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from segalign.errors import ConfigError
from segalign.formats.lora_pairs import LoraPairs
from segalign.formats.official_lora import match_official_lora, read_official_lora
from segalign.formats.peft_lora import fill_lora, load_diffusers_lora

# Every linear and convolution below ResnetBlock2D, Attention and GEGLU modules, as the official
# code selects them; projections in and out of a transformer and FFN outputs are left alone.
OFFICIAL_TARGETS = (
    r".*\.(conv1|conv2|conv_shortcut|time_emb_proj|to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj)"
)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Settings of the low-rank adapters.

    Args:
        rank: Rank r of every adapter; the scale is 1 (alpha = rank).
        target_modules: Regular expression of module names; the default is the official choice.
        init_from: LoRA to start from, of this rank and these modules: an official list file
            (``lora_vis.pt``) or a LoRA folder in diffusers layout. Null starts at no change: the
            first factor normal with deviation 1/r, the second zero.
    """

    rank: int = 32
    target_modules: str = OFFICIAL_TARGETS
    init_from: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                f"expected `lora.rank` of at least 1; got {self.rank}; the official rank is 32"
            )

    def add_to(self, unet: UNet2DConditionModel) -> None:
        """Freeze the network and add trainable float32 adapters.

        Args:
            unet: Network in any precision, which it keeps.

        Raises:
            ConfigError: If no module matches ``target_modules``.
            DataError: If ``init_from`` cannot be read, or is of another model, rank or choice of
                modules.
        """
        pairs = None if self.init_from is None else read_lora(self.init_from, unet)
        unet.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            lora_dropout=0.0,
            target_modules=self.target_modules,
            init_lora_weights="gaussian",
        )
        try:
            unet.add_adapter(config)
        except ValueError as error:
            raise ConfigError(
                f"expected `lora.target_modules` that match modules of the network; got "
                f"`{self.target_modules}`; leave it out for the official choice"
            ) from error
        for layer in unet.modules():
            if isinstance(layer, LoraLayer):
                self._widen(layer)
        if pairs is not None:
            fill_lora(unet, pairs)

    def _widen(self, layer: LoraLayer) -> None:
        """Make the adapters of one layer float32; PEFT has cast them to the base's precision."""
        for name, down in layer.lora_A.items():
            layer.lora_B[name].float()
            for weight in down.float().parameters():
                # The base's precision has rounded the first factor, so it is drawn again.
                nn.init.normal_(weight, std=1 / self.rank)


def read_lora(source: str, unet: nn.Module) -> LoraPairs:
    """Read a LoRA of a network, in either format.

    Args:
        source: Official list file (``lora_vis.pt``), or a LoRA folder in diffusers layout.
        unet: The network, for its structure only.

    Raises:
        DataError: If it cannot be read or is of another model.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return load_diffusers_lora(path, unet)
    return match_official_lora(read_official_lora(path), unet)
