"""Bytes of tensors that are alive, temporary ones included."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that are made in its block, for as long as anything uses it.

    Attributes:
        now: Bytes that are alive.
        peak: The most there were; may be set back.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage):
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, address):
        self.now -= self._sizes.pop(address)
