"""Reading facts off the token that ends a sentence, inside a whole caption.

A full-size text model has learnt from its data to gather what a sentence says where it ends. The
tiny one is taught: linear heads on the state of every sentence's last token name its place and
values. A generator can then attend to such tokens. Dims: B batch, M statements, D text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from segalign.scenes.questions import ANSWERS
from segalign.scenes.world import World
from segalign.text.tokenizer import CONTEXT_LENGTH, char_token_positions

_OCCUPANCY = ("empty",)


class FactReader(nn.Module):
    """Linear heads: place (the background counts as one), and the values of each fact kind.

    Args:
        world: World of the captions.
        width: Text width D.
    """

    def __init__(self, world: World, width: int) -> None:
        super().__init__()
        self.num_places = len(world.places)
        values = {**ANSWERS, "occupancy": _OCCUPANCY}
        self.values = {kind: (*names, "unstated") for kind, names in values.items()}
        sizes = {"place": self.num_places + 1} | {k: len(v) for k, v in self.values.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def statements(
        self,
        captions: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        tokenizer: CLIPTokenizer,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Locate the sentences that state facts.

        Args:
            captions: ``B`` captions of at most 77 tokens.
            metadata: Their metadata.
            tokenizer: The tokenizer.

        Returns:
            Row and token position of each statement, int64 ``(M, 2)``, and for each head the right
            class, int64 ``(M,)``.
        """
        places: list[tuple[int, int]] = []
        labels: dict[str, list[int]] = {name: [] for name in self.heads}
        for row, (caption, sample) in enumerate(zip(captions, metadata, strict=True)):
            if not caption:
                continue
            positions = char_token_positions(caption, tokenizer)
            for end, facts in _by_sentence(sample.get("facts", ())).items():
                if positions[end - 1] < CONTEXT_LENGTH - 1:
                    places.append((row, int(positions[end - 1])))
                    self._label(labels, facts)
        where = torch.tensor(places, dtype=torch.int64).view(-1, 2)
        return where, {k: torch.tensor(v, dtype=torch.int64) for k, v in labels.items()}

    def _label(self, labels: dict[str, list[int]], facts: Mapping[str, tuple[int, str]]) -> None:
        cell = next(iter(facts.values()))[0]
        labels["place"].append(self.num_places if cell < 0 else cell)
        for kind, names in self.values.items():
            labels[kind].append(names.index(facts[kind][1] if kind in facts else "unstated"))

    def forward(self, states: Tensor, where: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of each caption.

        Args:
            states: Last hidden states of the text model, ``(B, S, D)``; carries gradient.
            where: See `statements`.
            labels: See `statements`.

        Returns:
            Losses ``(B,)``: mean over a caption's statements of the summed cross-entropies.
        """
        read = states[where[:, 0], where[:, 1]]
        losses = sum(
            F.cross_entropy(head(read), labels[name].to(read.device), reduction="none")
            for name, head in self.heads.items()
        )
        assert isinstance(losses, Tensor)
        owner = where[:, 0].to(read.device)
        total = states.new_zeros(len(states)).index_add(0, owner, losses)
        return total / torch.bincount(owner, minlength=len(states)).clamp(min=1)


def _by_sentence(facts: Sequence[Sequence[Any]]) -> dict[int, dict[str, tuple[int, str]]]:
    """Group fact rows by the sentence that states them, keyed by where it ends."""
    sentences: dict[int, dict[str, tuple[int, str]]] = {}
    for kind, cell, value, _, end in facts:
        sentences.setdefault(end, {})[kind] = (cell, value)
    return sentences
