"""Read the states of any CLIP text model: those of one layer, and the final ones for pooling.

Dims: N sequences, S tokens of a sequence, D text width, E width of pooled features.
"""

from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segalign.errors import ConfigError
from segalign.text.open_clip_text import OpenClipText

TextModel: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection | OpenClipText


def text_states(text_model: TextModel, input_ids: Tensor, layer: int = -1) -> tuple[Tensor, Tensor]:
    """Run a text model.

    Args:
        text_model: The model.
        input_ids: Token ids, int64 ``(N, S)``.
        layer: -1 is the output of the final layer norm; -2 that of the last layer but one, without
            a norm, which SDXL reads; and so on.

    Returns:
        States of the layer, ``(N, S, D)``, and final states of all positions, mapped by the
        model's projection if it has one, ``(N, S, E)``. All positions are projected, not the end
        tokens alone, so that the result does not depend on the number of sequences.

    The model is called as a whole, so that hooks on it run, such as those of accelerate's
    offloading.
    """
    if layer == -1:
        final = text_model(input_ids=input_ids).last_hidden_state
        return final, project(text_model, final)
    recorded: list[Tensor] = []
    hook = layers_of(text_model)[layer].register_forward_hook(
        lambda _module, _inputs, states: recorded.append(states)
    )
    try:
        final = text_model(input_ids=input_ids).last_hidden_state
    finally:
        hook.remove()
    return recorded[0], project(text_model, final)


def project(text_model: TextModel, final_states: Tensor) -> Tensor:
    """Map final states to the joint space, ``(..., D)`` to ``(..., E)``, if the model does."""
    if isinstance(text_model, OpenClipText):
        return text_model.project(final_states)
    if isinstance(text_model, CLIPTextModelWithProjection):
        projected: Tensor = text_model.text_projection(final_states)
        return projected
    return final_states


def layers_of(text_model: TextModel) -> nn.ModuleList:
    """Return the transformer's layers."""
    if isinstance(text_model, OpenClipText):
        return text_model.layers
    is_wrapped = isinstance(text_model, CLIPTextModelWithProjection)
    transformer: Any = text_model.text_model if is_wrapped else text_model
    layers: nn.ModuleList = transformer.encoder.layers
    return layers


def check_model(text_model: TextModel, tokenizer: CLIPTokenizer, layer: int) -> None:
    """Refuse a model of a smaller vocabulary than its tokenizer's, or without the layer.

    Raises:
        ConfigError: In these cases.
    """
    expected, found = len(tokenizer), text_model.config.vocab_size
    if found < expected:
        raise ConfigError(
            f"the text model must know the tokenizer's {expected} tokens; its vocabulary has "
            f"{found}; pass the tokenizer that belongs to the model"
        )
    num_layers = len(layers_of(text_model))
    if not -num_layers <= layer <= -1:
        raise ConfigError(
            f"`layer` must be -1 (after the final norm) to -{num_layers} in a text model of "
            f"{num_layers} layers; got {layer}; SDXL reads -2"
        )


def check_projection(text_model: TextModel, projection: nn.Module | None) -> nn.Module | None:
    """Return the projection of pooled features, unless the model projects by itself.

    Raises:
        ConfigError: If both project.
    """
    if projection is not None and getattr(text_model, "text_projection", None) is not None:
        raise ConfigError(
            "`text_projection` must be left out where the text model projects by itself; got both; "
            "pass one of them"
        )
    return projection
