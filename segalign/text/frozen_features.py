"""Features of a frozen model, kept by input and forgotten when the model changes."""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from segalign.text.lru_cache import LruCache

K = TypeVar("K", bound=Hashable)


class FrozenFeatures(Generic[K]):
    """Encode equal inputs once, and keep the features of a frozen model.

    Features are kept only where a second pass would give the same: no gradient goes through the
    model, and it does not drop out. Copies and pickles start empty.

    Args:
        max_bytes: Bound on the memory of kept features, on the model's device; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._features: LruCache[tuple[K, str], Tensor] = LruCache(max_bytes)
        self._weight_versions: tuple[tuple[int, int], ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of kept features."""
        return self._features.cost

    def clear(self) -> None:
        """Forget all features.

        Changes of weights by an optimizer and by ``load_state_dict`` are noticed; call this after
        moves, casts, and writing to ``.data`` of a weight.
        """
        self._features.clear()

    def encode(
        self,
        model: nn.Module,
        inputs: Sequence[K],
        encode: Callable[[Sequence[K]], Sequence[Tensor]],
        *,
        dropout: float,
    ) -> list[Tensor]:
        """Encode inputs, equal ones once, known ones not at all.

        Args:
            model: The model that ``encode`` runs.
            inputs: What its features depend on.
            encode: Encodes distinct inputs to one tensor each.
            dropout: The model's dropout rate in training mode.

        Returns:
            The features of each input; equal inputs share a tensor. They carry gradient if the
            model is trainable and gradients are enabled.
        """
        distinct = list(dict.fromkeys(inputs))
        if not self._may_keep(model, dropout):
            encoded = dict(zip(distinct, encode(distinct), strict=True))
            return [encoded[key] for key in inputs]
        self._forget_stale(model)
        dtype = _autocast_dtype(model)
        found = {key: self._features.get((key, dtype)) for key in distinct}
        missing = [key for key, features in found.items() if features is None]
        if missing:
            with torch.no_grad():
                for key, view in zip(missing, encode(missing), strict=True):
                    features = found[key] = view.clone()
                    self._features.put((key, dtype), features, features.nbytes)
        known = {key: features for key, features in found.items() if features is not None}
        return [known[key] for key in inputs]

    def _may_keep(self, model: nn.Module, dropout: float) -> bool:
        """Tell whether another pass would give the same features, without gradient."""
        if self._features.max_cost == 0 or (model.training and dropout > 0):
            return False
        trainable = any(weight.requires_grad for weight in model.parameters())
        return not (trainable and torch.is_grad_enabled())

    def _forget_stale(self, model: nn.Module) -> None:
        """Forget all if a weight changed since the last look."""
        versions = tuple(
            (id(weight), 0 if weight.is_inference() else weight._version)
            for weight in model.parameters()
        )
        if versions != self._weight_versions:
            self.clear()
            self._weight_versions = versions


def _autocast_dtype(model: nn.Module) -> str:
    """Name the dtype that autocast computes in, or return an empty string."""
    device_type = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device_type):
        return ""
    return str(torch.get_autocast_dtype(device_type))
