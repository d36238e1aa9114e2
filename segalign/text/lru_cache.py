"""A cache that forgets what was used longest ago, bounded by cost."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Least-recently-used cache whose entries have a cost (bytes, say) and a bounded sum.

    Copies and pickles of it start empty.

    Args:
        max_cost: Bound on the sum of the entries' costs; 0 stores nothing.
    """

    def __init__(self, max_cost: int) -> None:
        self.max_cost = max_cost
        self.cost = 0
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the entries out."""
        return {"max_cost": self.max_cost, "cost": 0, "_entries": OrderedDict()}

    def get(self, key: K) -> V | None:
        """Return the value of a key and mark it as used, or None."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, cost: int) -> None:
        """Store a value, forgetting old ones; one that costs too much is not stored."""
        self.pop(key)
        if cost > self.max_cost:
            return
        self._entries[key] = (value, cost)
        self.cost += cost
        while self.cost > self.max_cost:
            self.pop(next(iter(self._entries)))

    def pop(self, key: K) -> None:
        """Forget a key, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.cost -= entry[1]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.cost = 0
