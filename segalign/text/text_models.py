"""The text models of one text-to-image model, loaded."""

from dataclasses import dataclass

from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segalign.text.t5_encoder import T5Encoder


@dataclass(frozen=True, kw_only=True, eq=False)
class TextModels:
    """Text models, before it is decided how captions are encoded with them.

    Attributes:
        text_model: CLIP text transformer.
        tokenizer: Its tokenizer.
        text_model_2: The second, projecting tower of SDXL, or None.
        tokenizer_2: Its tokenizer.
        t5: Whole-caption encoder that can be joined, adapter included, or None.
    """

    text_model: CLIPTextModel
    tokenizer: CLIPTokenizer
    text_model_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    t5: T5Encoder | None = None
