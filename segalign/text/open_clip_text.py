"""The border to ``open_clip``: one of its text towers, to be read like one of transformers.

Dims: N sequences, S tokens of a sequence, D text width, E width of pooled features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from segalign.errors import ConfigError
from segalign.text.tokenizer import VOCAB_SIZE

_END_TOKEN = VOCAB_SIZE - 1


class OpenClipText(nn.Module):
    """A causal ``open_clip`` text tower for :class:`~segalign.text.clip_tower.ClipTower`.

    Its parts keep the names that they have in ``open_clip``'s own state dict. Any length up to the
    context can be read. Use it with ``clip_tokenizer("!")``, whose padding is ``open_clip``'s.

    Args:
        model: A ``CLIP``, a ``CustomTextCLIP``, or the latter's ``text``.

    Raises:
        ConfigError: If the tower attends in both directions, has a class token, does not pool at
            the end token, or was made for another tokenizer than CLIP's.
    """

    attn_mask: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tower: Any = getattr(model, "text", model)
        _check_tower(tower)
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self.config = OpenClipConfig(tower)

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer's layers."""
        layers: nn.ModuleList = self.transformer.resblocks
        return layers

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = self.positional_embedding.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights of the layers."""
        dtype: torch.dtype = self.transformer.get_cast_dtype()
        return dtype

    @property
    def projected_width(self) -> int:
        """Width of projected states, E."""
        projection = self.text_projection
        if projection is None:
            return int(self.config.hidden_size)
        linear = isinstance(projection, nn.Linear)
        return int(projection.out_features if linear else projection.shape[1])

    def forward(self, *, input_ids: Tensor) -> BaseModelOutput:
        """Encode token ids, int64 ``(N, S)``.

        Returns:
            ``last_hidden_state``, after the final layer norm: ``(N, S, D)``.
        """
        length = input_ids.shape[1]
        positions = self.positional_embedding[:length].to(self.dtype)
        states = self.token_embedding(input_ids).to(self.dtype) + positions
        # The mask stays behind where the weights are moved by way of the whole model.
        mask = self.attn_mask[:length, :length].to(states)
        states = self.transformer(states, attn_mask=mask)
        return BaseModelOutput(last_hidden_state=self.ln_final(states))

    def project(self, final_states: Tensor) -> Tensor:
        """Map final states to the joint space, ``(..., D)`` to ``(..., E)``."""
        projection = self.text_projection
        if projection is None:
            return final_states
        linear = isinstance(projection, nn.Linear)
        projected: Tensor = projection(final_states) if linear else final_states @ projection
        return projected


class OpenClipConfig:
    """What :class:`~segalign.text.clip_tower.ClipTower` asks of a config, named as transformers do.

    Args:
        tower: The ``open_clip`` tower.
    """

    attention_dropout = 0.0

    def __init__(self, tower: Any) -> None:
        block = tower.transformer.resblocks[0]
        self.vocab_size: int = tower.token_embedding.num_embeddings
        self.max_position_embeddings, self.hidden_size = tower.positional_embedding.shape
        self.num_attention_heads: int = block.attn.num_heads
        self.layer_norm_eps: float = tower.ln_final.eps
        self.hidden_act = repr(block.mlp.gelu)


def _check_tower(tower: Any) -> None:
    """Refuse a tower whose states are not those of a causal CLIP text model."""
    if not hasattr(tower, "positional_embedding"):
        raise _refusal(f"`{type(tower).__name__}`, which `open_clip` takes from another library")
    if not _is_causal(tower.attn_mask):
        raise _refusal("one with bidirectional attention, whose features depend on the padding")
    if getattr(tower, "cls_emb", None) is not None:
        raise _refusal("one that pools at a class token")
    if tower.vocab_size != VOCAB_SIZE:
        raise _refusal(f"one with another tokenizer, of {tower.vocab_size} tokens")
    pool_type = getattr(tower, "pool_type", None) or tower.text_pool_type
    end_token = getattr(tower, "eos_id", None) or getattr(tower, "text_eos_id", None)
    if pool_type != "argmax" and (pool_type, end_token) != ("eos", _END_TOKEN):
        raise _refusal(f"one that pools with `{pool_type}`")


def _is_causal(attn_mask: Tensor | None) -> bool:
    """Tell whether an additive mask hides exactly the later tokens."""
    return attn_mask is not None and torch.equal(
        attn_mask.isinf(), torch.ones_like(attn_mask, dtype=torch.bool).triu(1)
    )


def _refusal(found: str) -> ConfigError:
    """Say what the tower must be."""
    return ConfigError(
        "the `open_clip` text tower must be causal, read CLIP's tokens and pool at the end token; "
        f"got {found}; use a model with OpenAI's kind of text tower, such as `ViT-H-14`"
    )
