"""Where the model comes from that preference training starts with."""

from dataclasses import dataclass
from typing import Final, Literal, Protocol

from transformers import CLIPConfig, CLIPModel

from segalign.errors import ConfigError
from segalign.formats.clip_scorer import ClipScorer, ImageSettings, Scorer, load_clip_scorer
from segalign.text.tokenizer import VOCAB_SIZE, clip_tokenizer

CLIP_H: Final = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Width, width of the feed-forward layers, blocks, heads.
_IMAGE_SIZES = {"vit-h-14": (1280, 5120, 32, 16), "tiny": (32, 64, 2, 2)}
_TEXT_SIZES = {"vit-h-14": (1024, 4096, 24, 16), "tiny": (32, 64, 2, 2)}
_IMAGES = {"vit-h-14": (224, 14, 1024), "tiny": (32, 8, 32)}


class ScorerSource(Protocol):
    """Something that a config can name, and that knows where a scorer's weights are."""

    def load(self) -> Scorer:
        """Build the scorer and read its weights; called once, when training is set up."""
        ...


@dataclass(frozen=True, kw_only=True)
class PretrainedScorer:
    """A CLIP model in Hugging Face layout.

    Args:
        model: Hub id or local folder; with ``init: random`` a size, ``vit-h-14`` or ``tiny``.
        init: ``pretrained`` reads weights; ``random`` builds the network without any, to measure
            or to try a recipe.
    """

    model: str = CLIP_H
    init: Literal["pretrained", "random"] = "pretrained"

    def load(self) -> Scorer:
        """Build the scorer.

        Raises:
            ConfigError: If it is not there, or no size is named.
            DataError: If its files are damaged.
        """
        return load_clip_scorer(self.model) if self.init == "pretrained" else _random(self.model)


def _random(size: str) -> ClipScorer:
    if size not in _IMAGES:
        known = ", ".join(f"`{name}`" for name in _IMAGES)
        raise ConfigError(f"expected a size among {known} for `init: random`; got `{size}`")
    side, patch, joint = _IMAGES[size]
    tokens = {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": VOCAB_SIZE - 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": VOCAB_SIZE - 1,
    }
    config = CLIPConfig(
        text_config={**_tower(_TEXT_SIZES[size]), **tokens, "projection_dim": joint},
        vision_config={
            **_tower(_IMAGE_SIZES[size]),
            "image_size": side,
            "patch_size": patch,
            "projection_dim": joint,
        },
        projection_dim=joint,
    )
    return ClipScorer(CLIPModel(config), clip_tokenizer(), ImageSettings(image_size=side))


def _tower(sizes: tuple[int, int, int, int]) -> dict[str, int | str]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, sizes, strict=True)), "hidden_act": "gelu"}
