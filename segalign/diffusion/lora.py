"""LoRA on the generator, by PEFT: no dropout, float32 weights over a frozen base."""

from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from peft import LoraConfig

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
    """

    rank: int = 32
    target_modules: str = OFFICIAL_TARGETS

    def add_to(self, unet: UNet2DConditionModel) -> None:
        """Freeze the network and add trainable float32 adapters."""
        unet.requires_grad_(False)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            lora_dropout=0.0,
            target_modules=self.target_modules,
            init_lora_weights="gaussian",
        )
        unet.add_adapter(config)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
