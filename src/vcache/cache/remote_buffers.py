"""Host buffers that a transfer engine reads slots of other hosts into: reused while it behaves, walled off when it does not."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence

from ..errors import ArgumentError
from ..segment.slots import HEADER_BYTES, align_up
from .buffers import Pinning, StagingBuffer

logger = logging.getLogger("vcache.remote")

_PROT_NONE = 0
_PRIVATE_ANONYMOUS_FIXED_NORESERVE = 0x02 | 0x20 | 0x10 | 0x4000


class RemoteBuffer(StagingBuffer):
    """Memory for one slot: header, payload, and at the end its header and its slab's as they are after the payload was read."""

    def __init__(self, payload_bytes: int) -> None:
        super().__init__(align_up(payload_bytes, HEADER_BYTES) + 2 * HEADER_BYTES)
        self.check_offset = self.slab.nbytes - 2 * HEADER_BYTES
        self.format_offset = self.slab.nbytes - HEADER_BYTES

    @property
    def address(self) -> int:
        return self.slab.address

    def header(self) -> bytes:
        return bytes(self.view[:HEADER_BYTES])

    def check(self) -> bytes:
        """The second header."""
        return bytes(self.view[self.check_offset : self.format_offset])

    def format(self) -> bytes:
        """The slab header."""
        return bytes(self.view[self.format_offset :])

    def blank(self) -> None:
        """Forget all headers: whatever is found there afterwards was read afterwards."""
        self.view[:HEADER_BYTES] = bytes(HEADER_BYTES)
        self.view[self.check_offset :] = bytes(2 * HEADER_BYTES)

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


class RemoteBuffers:
    """Hands out buffers, at most `limit` at a time. Thread-safe."""

    def __init__(self, payload_bytes: int, limit: int, pinning: Pinning | None = None) -> None:
        """`pinning`: makes buffers reachable for the GPU, once each."""
        self.limit = max(1, limit)
        self._payload_bytes = payload_bytes
        self._pinning = pinning
        self._free: list[RemoteBuffer] = []
        self._out = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, count: int, timeout: float | None = None) -> list[RemoteBuffer]:
        """Between 1 and `count` buffers; blocks until one is free, `[]` on timeout (seconds). Raises `ArgumentError` unless
        `count` is positive, `SegmentError` when the GPU cannot use one, and whatever else keeps one from being made."""
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
            self.give(taken, missing=count - len(taken))
            raise
        return taken

    def give(self, buffers: Sequence[RemoteBuffer], *, missing: int = 0) -> None:
        """Back, for the next one. `missing`: of those taken, how many there are not."""
        with self._changed:
            self._out -= len(buffers) + missing
            keep = not self._closed
            if keep:
                self._free += buffers
            self._changed.notify_all()
        if not keep:
            self._unpin(buffers)

    def retire(self, buffers: Sequence[RemoteBuffer]) -> None:
        """Never to be handed out again: somebody may still write to them. The caller keeps them alive until that is over."""
        self._unpin(buffers)
        for buffer in buffers:
            buffer.wall_off()
        with self._changed:
            self._out -= len(buffers)
            self._changed.notify_all()

    def close(self) -> None:
        """Drop what is free; what is still out is dropped when it comes back."""
        with self._changed:
            self._closed = True
            free, self._free = self._free, []
        self._unpin(free)

    def _make(self) -> RemoteBuffer:
        buffer = RemoteBuffer(self._payload_bytes)
        if self._pinning is not None:
            self._pinning.register(buffer.slab)
        return buffer

    def _unpin(self, buffers: Sequence[RemoteBuffer]) -> None:
        if self._pinning is not None:
            for buffer in buffers:
                self._pinning.unregister(buffer.slab)
