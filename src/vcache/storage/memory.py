"""A storage tier in this process's memory: for tests, trials and as the smallest example of the interface."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from ..errors import StorageError
from ..keys import CacheKey
from .base import StorageTier


class MemoryStorage(StorageTier):
    """Keeps values in a dictionary, oldest dropped first beyond `capacity` bytes. Nothing blocks."""

    def __init__(self, capacity: int = 2**40) -> None:
        self.capacity = capacity
        self._values: OrderedDict[tuple[CacheKey, int], bytes] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()
        self._closed = False

    def prefix(self, keys: Sequence[CacheKey], shard: int) -> int:
        with self._lock:
            self._check_open()
            return next((i for i, key in enumerate(keys) if (key, shard) not in self._values), len(keys))

    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        with self._lock:
            self._check_open()
            return [self._put(key, shard, value) for key, value in zip(keys, values, strict=True)]

    def _put(self, key: CacheKey, shard: int, value: memoryview) -> bool:
        if (key, shard) in self._values:
            return True
        if value.nbytes > self.capacity:
            return False
        while self._nbytes + value.nbytes > self.capacity:
            _, dropped = self._values.popitem(last=False)
            self._nbytes -= len(dropped)
        self._values[key, shard] = bytes(value)
        self._nbytes += value.nbytes
        return True

    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        with self._lock:
            self._check_open()
            return [self._get(key, shard, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _get(self, key: CacheKey, shard: int, buffer: memoryview) -> int:
        value = self._values.get((key, shard))
        if value is None or len(value) > buffer.nbytes:
            return -1
        buffer[: len(value)] = value
        return len(value)

    def remove(self, keys: Sequence[CacheKey], shard: int) -> None:
        with self._lock:
            self._check_open()
            for key in keys:
                self._nbytes -= len(self._values.pop((key, shard), b""))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._values.clear()
            self._nbytes = 0

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError("memory storage: already closed")
