"""The ordinary encoding of a caption, cut at the text model's context: the baseline.

Dims: B captions, S context (CLIP: 77), D text width, E width of pooled features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from segalign.text.clip_tower import ClipTower, TokenFeatures
from segalign.text.conditioning import TextConditioning, TextReport


class TruncatedEncoder(nn.Module):
    """Encode whole captions, cut and padded to the context, as Stable Diffusion does.

    A caption keeps its first 75 tokens. The interface is that of ``SegmentEncoder``.

    Args:
        text_model: CLIP text model of any width.
        tokenizer: Its tokenizer.
        text_projection: Maps pooled features from D to E; None leaves them as they are.
        cache_bytes: Bound on the memory of cached features; 0 caches nothing.
    """

    def __init__(
        self,
        text_model: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        *,
        text_projection: nn.Module | None = None,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        super().__init__()
        self.tower = ClipTower(text_model, tokenizer, cache_bytes=cache_bytes)
        self.text_projection = text_projection
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
        words = [self.tower.word_ids(caption) for caption in captions]
        room = self.tower.max_word_tokens
        sequences = [self.tower.wrap(ids[:room], padded=True) for ids in words]
        features: TokenFeatures = self.tower(sequences)
        lengths = tuple(min(len(ids), room) + 2 for ids in words)
        device = features.rows.device
        positions = torch.arange(self.token_budget, device=device)
        first_rows = torch.tensor([features.first_rows[s] for s in sequences], device=device)
        num_tokens = torch.tensor(lengths, device=device)
        report = TextReport(
            num_segments=(1,) * len(words),
            cut_segments=tuple(int(len(ids) > room) for ids in words),
            dropped_tokens=tuple(max(len(ids) - room, 0) for ids in words),
            kept_tokens=lengths,
        )
        return TextConditioning(
            prompt_embeds=features.rows[first_rows.unsqueeze(1) + positions],
            attention_mask=positions < num_tokens.unsqueeze(1),
            pooled=self._project(features.rows[first_rows + num_tokens - 1]),
            report=report,
        )

    def encode_empty(self, batch_size: int) -> TextConditioning:
        """Encode the empty caption, the negative prompt of classifier-free guidance.

        Returns:
            Conditioning whose tensors are one row expanded to ``batch_size``: do not write to it.
        """
        empty: TextConditioning = self([""])
        return empty.expand(batch_size)

    def clear_cache(self) -> None:
        """Forget cached features; needed after writing to ``.data`` of a weight."""
        self.tower.clear_cache()

    def _project(self, pooled: Tensor) -> Tensor:
        """Map pooled features to the joint space, if there is a projection."""
        return pooled if self.text_projection is None else self.text_projection(pooled)
