"""Keys and values of a fixed text, computed once for all steps.

Dims: M rows, L text tokens, D text width, F inner width of an attention.
"""

from typing import Any, cast

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from segalign.diffusion.stand_ins import Places


class KnownText(nn.Module):
    """A projection that has been computed for texts that it knows.

    Args:
        layer: The projection ``(M, L, D) -> (M, L, F)``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.known: list[tuple[Tensor, Tensor]] = []

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        """Look a text up; one that is not the very tensor of a known text is projected anew."""
        for text, projected in self.known:
            if encoder_hidden_states is text:
                return projected
        return cast("Tensor", self.layer(encoder_hidden_states))


class TextCache:
    """Stand-ins for the key and value projections of cross-attention.

    Every attention processor works with it. Text that a network changes on its way to the
    projections (a norm, a projection of its own) is computed at each call, as without the cache.

    Args:
        network: A diffusers UNet.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        # Kept from rollout to rollout, so that compiled code finds the same modules again.
        self._stand_ins: dict[tuple[nn.Module, str], KnownText] = {}

    def places(self, merged: Places) -> Places:
        """Return stand-ins that know no text yet.

        Args:
            merged: Stand-ins of projections with adapters, which do the projecting then.
        """
        if getattr(self._network, "encoder_hid_proj", None) is not None:
            return {}
        found: Places = {}
        for attention in self._network.modules():
            if isinstance(attention, Attention) and _sees_text_as_it_is(attention):
                for name in ("to_k", "to_v"):
                    place: tuple[nn.Module, str] = (attention, name)
                    layer = merged.get(place, attention._modules[name])
                    found[place] = self._stand_in(place, cast("nn.Module", layer))
        return found

    def learn(self, text: Tensor, rows: Tensor | None = None) -> None:
        """Project a text in all places, without gradient, in the precision of the caller.

        Args:
            text: What the network will be called with, ``(M, L, D)``: this very tensor.
            rows: Its first rows as a tensor of their own, which is then known too.
        """
        for stand_in in self._stand_ins.values():
            projected = stand_in.layer(text)
            stand_in.known.append((text, projected))
            if rows is not None:
                stand_in.known.append((rows, projected[: len(rows)]))

    def forget(self) -> None:
        """Forget all texts."""
        for stand_in in self._stand_ins.values():
            stand_in.known = []

    def _stand_in(self, place: tuple[nn.Module, str], layer: nn.Module) -> KnownText:
        if place not in self._stand_ins:
            self._stand_ins[place] = KnownText(layer)
        self._stand_ins[place].layer = layer
        return self._stand_ins[place]


def _sees_text_as_it_is(attention: Attention) -> bool:
    """Tell whether an attention projects the text, and nothing has changed it before."""
    return (
        attention.is_cross_attention
        and attention.added_kv_proj_dim is None
        and not attention.norm_cross
    )
