"""Host buffers between the storage tier and the paged cache: one value (header, payload) each, reused, bounded in number."""

from __future__ import annotations

import mmap
import threading
from ctypes import addressof, c_char
from typing import NamedTuple, Protocol

from ..errors import ArgumentError
from ..segment.backing import MappedSlab
from ..segment.mapping import PinnedSlot
from ..segment.slots import HEADER_BYTES, align_up
from ..storage.base import StorageTier
from ..storage.values import value_bytes

STAGING_LIMITS = (8, 4, 8)
"""Buffers of `Staging`: bounds host memory, and is enough to fill batched gets and puts. Made when first used."""


class StagingBuffer:
    """Memory for one value. `slot` looks like a slot of the pool, so that movers and header checks work on it unchanged."""

    def __init__(self, payload_bytes: int) -> None:
        nbytes = align_up(value_bytes(payload_bytes), mmap.PAGESIZE)
        memory = mmap.mmap(-1, nbytes)
        first = c_char.from_buffer(memory)
        self.view = memoryview(memory)
        self.slab = MappedSlab("host", "host", nbytes, addressof(first), buffer=self.view, resource=(memory, first))
        self.slot = PinnedSlot(self.slab, 0, HEADER_BYTES)


class Pinning(Protocol):
    """Makes host memory reachable for a GPU (`segment.cuda.PageLock`)."""

    def register(self, slab: MappedSlab) -> int: ...

    def unregister(self, slab: MappedSlab) -> None: ...


class StagingPool:
    """Hands out staging buffers, at most `limit` at a time. Thread-safe."""

    def __init__(self, payload_bytes: int, limit: int, storage: StorageTier, pinning: Pinning | None = None) -> None:
        """Buffers are registered with `storage`, and with the GPU when there is `pinning`, once each."""
        self.limit = max(1, limit)
        self._payload_bytes = payload_bytes
        self._storage = storage
        self._pinning = pinning
        self._free: list[StagingBuffer] = []
        self._out = 0
        self._changed = threading.Condition()

    def take(self, count: int, timeout: float | None = None) -> list[StagingBuffer]:
        """Between 1 and `count` buffers; blocks until one is free, `[]` on timeout (seconds). Raises `ArgumentError` unless
        `count` is positive, and whatever keeps a new buffer from being made."""
        if count < 1:
            raise ArgumentError(f"count: must be at least 1, got {count}")
        with self._changed:
            if not self._changed.wait_for(lambda: self._out < self.limit, timeout):
                return []
            count = min(count, self.limit - self._out)
            self._out += count
            taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        try:
            while len(taken) < count:
                taken.append(self._make())
        except BaseException:
            with self._changed:
                self._out -= count
                self._free += taken
                self._changed.notify_all()
            raise
        return taken

    def give(self, buffers: list[StagingBuffer]) -> None:
        with self._changed:
            self._free += buffers
            self._out -= len(buffers)
            self._changed.notify_all()

    def close(self) -> None:
        """Unregister what is free. Buffers still out are dropped by whoever holds them."""
        with self._changed:
            free, self._free = self._free, []
        for buffer in free:
            self._storage.unregister(buffer.view)
            if self._pinning is not None:
                self._pinning.unregister(buffer.slab)

    def _make(self) -> StagingBuffer:
        buffer = StagingBuffer(self._payload_bytes)
        self._storage.register(buffer.view)
        try:
            if self._pinning is not None:
                self._pinning.register(buffer.slab)
        except BaseException:
            self._storage.unregister(buffer.view)
            raise
        return buffer


class Staging(NamedTuple):
    """The staging buffers of an engine, apart for each use: none of them ever waits for another one's."""

    reads: StagingPool
    """From storage to the paged cache."""
    writes: StagingPool
    """From the pool to storage."""
    gathers: StagingPool
    """From the paged cache to storage: what found no room in the pool."""

    @classmethod
    def open(cls, payload_bytes: int, limit: int, storage: StorageTier, pinning: Pinning | None = None) -> Staging:
        """`limit`: buffers of each kind, at most."""
        return cls(*(StagingPool(payload_bytes, min(most, limit), storage, pinning) for most in STAGING_LIMITS))

    def close(self) -> None:
        """As `StagingPool.close`."""
        for pool in self:
            pool.close()
