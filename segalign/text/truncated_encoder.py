"""The ordinary encoding of a caption, cut at the text model's context: the baseline.

Dims: B captions, S context (CLIP: 77), D text width, E width of pooled features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from segalign.text.clip_tower import ClipTower, TokenFeatures
from segalign.text.conditioning import CaptionEncoder, TextConditioning, TextReport
from segalign.text.text_states import TextModel, check_projection
from segalign.text.tokenizer import TokenIds


class TruncatedEncoder(CaptionEncoder):
    """Encode whole captions, cut and padded to the context, as Stable Diffusion does.

    A caption keeps its first 75 tokens. The interface is that of ``SegmentEncoder``.

    Args:
        text_model: CLIP text model of any width; its own projection, if it has one, is applied.
        tokenizer: Its tokenizer.
        layer: See :class:`~segalign.text.clip_tower.ClipTower`.
        text_projection: Maps pooled features from D to E; None leaves them as they are.
        cache_bytes: Bound on the memory of cached features; 0 caches nothing.
    """

    def __init__(
        self,
        text_model: TextModel,
        tokenizer: CLIPTokenizer,
        *,
        layer: int = -1,
        text_projection: nn.Module | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__()
        self.tower = ClipTower(text_model, tokenizer, layer=layer, cache_bytes=cache_bytes)
        self.text_projection = check_projection(text_model, text_projection)
        self.token_budget = self.tower.context_length
        self.width = self.tower.width

    def forward(self, captions: Sequence[str]) -> TextConditioning:
        """Encode captions.

        Args:
            captions: B captions.

        Returns:
            Conditioning of length S: start, up to 75 words, end, and the encoded padding. The
            mask is True up to the end token, whose state is ``pooled``.
        """
        if not captions:
            raise ValueError("expected at least one caption; got none")
        words = [self.tower.word_ids(caption) for caption in captions]
        room = self.tower.max_word_tokens
        lengths = tuple(min(len(ids), room) + 2 for ids in words)
        prompt_embeds, pooled = self._read([ids[:room] for ids in words])
        device = prompt_embeds.device
        num_tokens = torch.tensor(lengths, device=device).unsqueeze(1)
        report = TextReport(
            num_segments=(1,) * len(words),
            cut_segments=tuple(int(len(ids) > room) for ids in words),
            dropped_tokens=tuple(max(len(ids) - room, 0) for ids in words),
            kept_tokens=lengths,
        )
        return TextConditioning(
            prompt_embeds=prompt_embeds,
            attention_mask=torch.arange(self.token_budget, device=device) < num_tokens,
            pooled=pooled,
            report=report,
            num_leading=max(lengths),
        )

    def clear_cache(self) -> None:
        """Forget cached features; needed after writing to ``.data`` of a weight."""
        self.tower.clear_cache()

    def _read(self, words: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        """Encode fitting word tokens to ``prompt_embeds (B, S, D)`` and ``pooled (B, E)``."""
        prompt_embeds, pooled = read_padded(self.tower, words)
        return prompt_embeds, self._project(pooled)

    def _project(self, pooled: Tensor) -> Tensor:
        """Map pooled features to the joint space, if there is a projection."""
        return pooled if self.text_projection is None else self.text_projection(pooled)


def read_padded(tower: ClipTower, words: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
    """Encode whole captions, padded to the context.

    Args:
        tower: The encoder.
        words: Word tokens of B captions that fit the context.

    Returns:
        States of all positions, ``(B, S, D)``, and pooled features, ``(B, E)``.
    """
    sequences = [tower.wrap(ids, padded=True) for ids in words]
    features: TokenFeatures = tower(sequences)
    device = features.rows.device
    first_rows = torch.tensor([features.first_rows[s] for s in sequences], device=device)
    pooled_rows = torch.tensor([features.pooled_rows[s] for s in sequences], device=device)
    positions = torch.arange(tower.context_length, device=device)
    return features.rows[first_rows.unsqueeze(1) + positions], features.pooled[pooled_rows]
