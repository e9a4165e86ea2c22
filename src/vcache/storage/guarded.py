"""Deadline and circuit breaker around any storage tier, so that it can never hold an engine up."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from ..errors import StorageDeadlineError, StorageError
from ..guard import CallTimeoutError, CircuitBreaker, DaemonThreads, Guard
from ..keys import CacheKey
from .base import StorageTier

T = TypeVar("T")

LOOKUP_SHARE = 0.2
"""Part of the deadline that a look-up may take: it moves no bytes, and stands before every request."""
WRITE_FACTOR = 10
"""Writes, which nobody waits for, may take this many times the deadline."""
_PROBE_KEY = CacheKey(bytes(16), bytes(16))


class _Read(NamedTuple):
    """A `get`: what is tried again to find out whether reads work."""

    keys: tuple[CacheKey, ...]
    shard: int
    nbytes: int
    """Of its longest buffer."""


class GuardedStorage(StorageTier):
    """Runs another tier's calls in threads of its own. A call that outlasts its deadline is left behind and raises; whatever
    the tier raises is a `StorageError`; after some failures calls raise at once. Then probes in the background find out when
    the tier is well again, and no caller waits for them: a look-up for a key that nobody has, and the read that failed last,
    since a directory may answer while those who hold the values do not. Reads (`prefix`, `get`) and writes (`put`, `remove`)
    have threads of their own, so that a slow write does not delay a look-up. The threads do not hold up the end of the
    process."""

    def __init__(self, tier: StorageTier, deadline: float, *, breaker: CircuitBreaker | None = None, threads: int = 2) -> None:
        """`deadline`: seconds that a `get` may take. `threads`: reads at a time."""
        self._tier = tier
        self._deadline = deadline
        self._reads = DaemonThreads("vcache-storage-read", threads)
        self._writes = DaemonThreads("vcache-storage-write", 1)
        self._probes = DaemonThreads("vcache-storage-probe", 1)
        self._guard = Guard(self._probes.start, breaker)
        self.breaker = self._guard.breaker
        self._failed_read: _Read | None = None

    def prefix(self, keys: Sequence[CacheKey], shard: int) -> int:
        return self._call(self._reads, "look-up", LOOKUP_SHARE * self._deadline, lambda: self._tier.prefix(keys, shard))

    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        read = _Read(tuple(keys), shard, max((buffer.nbytes for buffer in buffers), default=0))
        return self._call(self._reads, "get", self._deadline, lambda: self._tier.get(keys, shard, buffers), read)

    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        return self._call(self._writes, "put", WRITE_FACTOR * self._deadline, lambda: self._tier.put(keys, shard, values))

    def remove(self, keys: Sequence[CacheKey], shard: int) -> None:
        self._call(self._writes, "remove", WRITE_FACTOR * self._deadline, lambda: self._tier.remove(keys, shard))

    def register(self, buffer: memoryview) -> None:
        """As `StorageTier.register`. Raises `StorageError`, whatever the tier raises."""
        try:
            self._tier.register(buffer)
        except Exception as error:
            raise _storage_error("register", error) from error

    def unregister(self, buffer: memoryview) -> None:
        self._tier.unregister(buffer)

    def close(self) -> None:
        """Give the tier's own close the deadline; what still hangs then is left to the end of the process."""
        if not self._guard.close():
            return
        for threads in (self._reads, self._writes, self._probes):
            threads.close()
        closer = threading.Thread(target=self._tier.close, name="vcache-storage-close", daemon=True)
        closer.start()
        closer.join(self._deadline)

    def _call(self, threads: DaemonThreads, what: str, deadline: float, work: Callable[[], T], read: _Read | None = None) -> T:
        """Run `work` within `deadline` seconds. `read`: what it reads, if it does."""
        if self._guard.closed:
            raise StorageError(f"storage {what}: already closed")
        if not self._guard.admits(self._probe):
            raise StorageError(f"storage {what}: bypassed after repeated failures, next try in {self.breaker.retry_in():.1f} s")

        def failing() -> None:
            self._failed_read = read or self._failed_read

        try:
            return self._guard.call(work, time.monotonic() + deadline, threads.start, failing)
        except CallTimeoutError as late:
            if not late.began:
                raise StorageError(f"storage {what}: no thread was free within {deadline:g} s") from None
            raise StorageDeadlineError(f"storage {what}: no answer within {deadline:g} s", late.when_over) from None
        except Exception as error:
            raise _storage_error(what, error) from error

    def _probe(self) -> None:
        """Look up, and read again what could not be read. Blocks for as long as the tier does; raises what it raises."""
        self._tier.prefix([_PROBE_KEY], 0)
        read = self._failed_read
        if read is not None and read.nbytes:
            buffer = memoryview(mmap.mmap(-1, read.nbytes))
            self._tier.register(buffer)
            try:
                for key in read.keys:  # which may lie with several owners
                    self._tier.get([key], read.shard, [buffer])
            finally:
                self._tier.unregister(buffer)
        self._failed_read = None


def _storage_error(what: str, error: Exception) -> StorageError:
    return error if isinstance(error, StorageError) else StorageError(f"storage {what}: {type(error).__name__}: {error}")
