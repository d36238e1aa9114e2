"""Features of a frozen model, kept by input and forgotten when the model changes."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from segalign.text.lru_cache import LruCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", Tensor, tuple[Tensor, Tensor])

WeightVersions: TypeAlias = tuple[tuple[int, int], ...]


class FrozenFeatures(Generic[K, V]):
    """Encode equal inputs once, and keep the features of a frozen model.

    Features, a tensor or a pair of them for each input, are kept only where a second pass would
    give the same: no gradient goes through the model, and it does not drop out. Under autocast
    they are kept apart. Copies and pickles start empty.

    Args:
        max_bytes: Bound on the memory of kept features, on the model's device; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._cache: LruCache[tuple[K, str], V] = LruCache(max_bytes)
        self._model_state: tuple[Any, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of kept features."""
        return self._cache.cost

    def clear(self) -> None:
        """Forget all features.

        Changes of weights by an optimizer and by ``load_state_dict``, moves and casts are noticed;
        call this after writing to ``.data`` of a weight, and after casts there and back.
        """
        self._cache.clear()

    def encode(
        self,
        model: nn.Module,
        inputs: Sequence[K],
        encode: Callable[[Sequence[K]], Sequence[V]],
        *,
        dropout: float,
        look_up: Callable[[K], V | None] | None = None,
    ) -> list[V]:
        """Encode inputs, equal ones once, known ones not at all.

        Args:
            model: The model that ``encode`` runs.
            inputs: What its features depend on.
            encode: Encodes distinct inputs to their features.
            dropout: The model's dropout rate in training mode.
            look_up: Finds features elsewhere, in memory of their own, or returns None; it is asked
                for what is not kept, but not where another pass would differ.

        Returns:
            The features of each input; equal inputs share them. They carry gradient if the model
            is trainable and gradients are enabled.
        """
        distinct = list(dict.fromkeys(inputs))
        keeps_nothing = self._cache.max_cost == 0 and look_up is None
        if keeps_nothing or not is_constant(model, dropout):
            encoded = dict(zip(distinct, encode(distinct), strict=True))
            return [encoded[key] for key in inputs]
        self._forget_stale(model)
        dtype = _autocast_dtype(model)
        found = {key: self._find(key, dtype, look_up) for key in distinct}
        known = {key: features for key, features in found.items() if features is not None}
        missing = [key for key in distinct if key not in known]
        if missing:
            with torch.no_grad():
                for key, views in zip(missing, encode(missing), strict=True):
                    known[key] = self._keep(key, dtype, _own_memory(views))
        return [known[key] for key in inputs]

    def _find(self, key: K, dtype: str, look_up: Callable[[K], V | None] | None) -> V | None:
        """Find features among those kept, or else elsewhere."""
        features = self._cache.get((key, dtype))
        if features is None and look_up is not None:
            features = look_up(key)
            if features is not None:
                self._keep(key, dtype, features)
        return features

    def _keep(self, key: K, dtype: str, features: V) -> V:
        """Keep features, as far as memory allows."""
        self._cache.put((key, dtype), features, _num_bytes(features))
        return features

    def _forget_stale(self, model: nn.Module) -> None:
        """Forget all if a weight, its number type or its device changed since the last look."""
        dtypes = tuple(weight.dtype for weight in model.parameters())
        state = weight_versions(model), dtypes, execution_device(model)
        if state != self._model_state:
            self.clear()
            self._model_state = state


def is_constant(model: nn.Module, dropout: float) -> bool:
    """Tell whether another pass would give the same features, without gradient.

    Args:
        model: The model.
        dropout: Its dropout rate in training mode.
    """
    if model.training and dropout > 0:
        return False
    is_trained = any(weight.requires_grad for weight in model.parameters())
    return not (is_trained and torch.is_grad_enabled())


def weight_versions(model: nn.Module) -> WeightVersions:
    """Identify the weights and their contents, as far as PyTorch counts changes.

    Moves and casts in place of a module do not count.
    """
    return tuple(
        (id(weight), 0 if weight.is_inference() else weight._version)
        for weight in model.parameters()
    )


def execution_device(model: nn.Module) -> torch.device:
    """Return the device that a model computes on.

    It is that of the weights, unless accelerate brings these there only for a pass (offloading).
    """
    for module in model.modules() if hasattr(model, "_hf_hook") else ():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


def _own_memory(views: V) -> V:
    """Copy features out of the pass that they are views of."""
    if isinstance(views, Tensor):
        return views.clone()
    first, second = views
    return first.clone(), second.clone()


def _num_bytes(features: Tensor | tuple[Tensor, Tensor]) -> int:
    tensors = (features,) if isinstance(features, Tensor) else features
    return sum(tensor.nbytes for tensor in tensors)


def _autocast_dtype(model: nn.Module) -> str:
    """Name the dtype that autocast computes in, or return an empty string."""
    device_type = execution_device(model).type
    if not torch.is_autocast_enabled(device_type):
        return ""
    return str(torch.get_autocast_dtype(device_type))
