"""A thread-safe LRU table, and the feature cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from cachetools import LRUCache

from vllm_vtprune.features import VisualFeatures

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedTable(Generic[K, V]):
    """A thread-safe mapping that evicts the least recently used entries.

    Args:
        capacity: upper bound of the total size. A larger value is not stored.
        size: size of a value; None: 1.
    """

    def __init__(self, capacity: int, size: Callable[[V], int] | None = None) -> None:
        self._entries: LRUCache[K, V] = LRUCache(capacity, size)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def capacity(self) -> int:
        """Upper bound of the total size."""
        return int(self._entries.maxsize)

    def __iter__(self) -> Iterator[K]:
        with self._lock:
            return iter(list(self._entries))

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._entries.pop(key, None)
            if self._entries.getsizeof(value) <= self._entries.maxsize:
                self._entries[key] = value

    def get(self, key: K) -> V | None:
        with self._lock:
            return self._entries.get(key)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


class FeatureCache(BoundedTable[str, VisualFeatures]):
    """Visual features, bounded by the bytes of their tensors.

    The key identifies image and preprocessing only, so another question or policy does not encode an image again.

    Args:
        capacity_bytes: upper bound of `nbytes`; 0 disables the cache.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, lambda features: features.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes held by the cached tensors."""
        return int(self._entries.currsize)
