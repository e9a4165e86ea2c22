"""Host buffers that look like slots, between a paged cache and what is no mapped memory: reused, and bounded in number."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ..errors import ArgumentError, StorageDeadlineError
from ..segment.backing import MappedSlab
from ..segment.mapping import PinnedSlot
from ..segment.slots import HEADER_BYTES, align_up

logger = logging.getLogger("vcache.buffers")

_PROT_NONE = 0
_PRIVATE_ANONYMOUS_FIXED_NORESERVE = 0x02 | 0x20 | 0x10 | 0x4000


class SlotBuffer:
    """Memory for a header and what follows it. `slot` is as one of the pool: movers and header checks work on it unchanged."""

    def __init__(self, nbytes: int) -> None:
        """At least `nbytes`, rounded up to whole pages."""
        nbytes = align_up(nbytes, mmap.PAGESIZE)
        memory = mmap.mmap(-1, nbytes)
        first = ctypes.c_char.from_buffer(memory)
        self.view = memoryview(memory)
        self.slab = MappedSlab("host", "host", nbytes, ctypes.addressof(first), buffer=self.view, resource=(memory, first))
        self.slot = PinnedSlot(self.slab, 0, HEADER_BYTES)

    @property
    def address(self) -> int:
        return self.slab.address

    def wall_off(self) -> None:
        """Give the memory back to the system but keep its addresses: who writes there from now on gets an error."""
        # `mmap` over the old mapping changes both in one step. The addresses stay ours until the buffer is collected.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        flags = _PRIVATE_ANONYMOUS_FIXED_NORESERVE
        if libc.mmap(self.address, self.slab.nbytes, _PROT_NONE, flags, -1, 0) != self.address:
            # It stays as it is: memory that is lost, not memory that is reused.
            logger.warning("a buffer of %d bytes cannot be given back (errno %d)", self.slab.nbytes, ctypes.get_errno())


class Registry(Protocol):
    """Prepares memory that will be used again and again (`storage.base.StorageTier`)."""

    def register(self, buffer: memoryview, /) -> None: ...

    def unregister(self, buffer: memoryview, /) -> None: ...


class Pinning(Protocol):
    """Makes host memory reachable for a GPU (`segment.cuda.PageLock`)."""

    def register(self, slab: MappedSlab) -> int: ...

    def unregister(self, slab: MappedSlab) -> None: ...


class BufferPool:
    """Hands out buffers, at most `limit` at a time, made when they are first needed. Thread-safe."""

    def __init__(self, nbytes: int, limit: int, *, registry: Registry | None = None, pinning: Pinning | None = None) -> None:
        """`nbytes`: of each buffer, header included. Each is registered once with `registry` and, for the GPU, `pinning`."""
        self.limit = max(1, limit)
        self._nbytes = nbytes
        self._registry = registry
        self._pinning = pinning
        self._free: list[SlotBuffer] = []
        self._out = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, count: int, timeout: float | None = None) -> list[SlotBuffer]:
        """Take between 1 and `count` buffers; blocks until one is free, `[]` on timeout (seconds). Raises `ArgumentError`
        unless `count` is positive, and whatever keeps a new buffer from being made."""
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
            self._back(taken, count)
            raise
        return taken

    def give(self, buffers: Sequence[SlotBuffer]) -> None:
        """Put buffers back, for whoever takes them next."""
        self._back(buffers, len(buffers))

    @contextmanager
    def giving_back(self, buffers: list[SlotBuffer]) -> Iterator[None]:
        """Give `buffers`, which may grow meanwhile, back at the end of the block; after a `StorageDeadlineError` only when the
        call that still uses them is over."""
        try:
            yield
        except StorageDeadlineError as error:
            error.when_over(lambda: self.give(buffers))
            raise
        except BaseException:
            self.give(buffers)
            raise
        self.give(buffers)

    def retire(self, buffers: Sequence[SlotBuffer]) -> None:
        """Wall buffers off that somebody may still write to. The caller keeps them alive until that is over."""
        self._unregister(buffers)
        for buffer in buffers:
            buffer.wall_off()
        self._back([], len(buffers))

    def close(self) -> None:
        """Drop what is free now, and what is still out when it comes back."""
        with self._changed:
            self._closed = True
            free, self._free = self._free, []
        self._unregister(free)

    def _back(self, buffers: Sequence[SlotBuffer], count: int) -> None:
        """`count` are not out any more, of which `buffers` may be used again."""
        with self._changed:
            self._out -= count
            keep = not self._closed
            if keep:
                self._free += buffers
            self._changed.notify_all()
        if not keep:
            self._unregister(buffers)

    def _make(self) -> SlotBuffer:
        buffer = SlotBuffer(self._nbytes)
        if self._registry is not None:
            self._registry.register(buffer.view)
        try:
            if self._pinning is not None:
                self._pinning.register(buffer.slab)
        except BaseException:
            if self._registry is not None:
                self._registry.unregister(buffer.view)
            raise
        return buffer

    def _unregister(self, buffers: Sequence[SlotBuffer]) -> None:
        for buffer in buffers:
            if self._registry is not None:
                self._registry.unregister(buffer.view)
            if self._pinning is not None:
                self._pinning.unregister(buffer.slab)
