"""Deadline and circuit breaker around any storage tier, so that it can never hold an engine up."""

from __future__ import annotations

import mmap
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple, TypeVar

from ..errors import StorageDeadlineError, StorageError
from ..guard import CircuitBreaker
from ..keys import CacheKey
from .base import StorageTier

T = TypeVar("T")

LOOKUP_SHARE = 0.2
"""Part of the deadline that a look-up may take: it moves no bytes, and stands before every request."""
WRITE_FACTOR = 10
"""Writes, which nobody waits for, may take this many times the deadline."""
_PROBE_KEY = CacheKey(bytes(16), bytes(16))
_MAX_COOLDOWN = 4.0


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
        self.breaker = breaker or CircuitBreaker(
            time.monotonic, threshold=2, cooldown=0.5, max_cooldown=_MAX_COOLDOWN, jitter=random.random
        )
        self._reads = _Lane("read", threads)
        self._writes = _Lane("write", 1)
        self._probes = _Lane("probe", 1)
        self._probe: Future[None] | None = None
        self._failed_read: _Read | None = None
        self._lock = threading.Lock()
        self._closed = False

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
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for lane in (self._reads, self._writes, self._probes):
            lane.close()
        closer = threading.Thread(target=self._tier.close, name="vcache-storage-close", daemon=True)
        closer.start()
        closer.join(self._deadline)

    def _call(self, lane: _Lane, what: str, deadline: float, work: Callable[[], T], read: _Read | None = None) -> T:
        """Run `work` within `deadline` seconds. `read`: what it reads, if it does."""
        if self._closed:
            raise StorageError(f"storage {what}: already closed")
        if self.breaker.state != "closed":
            self._probe_when_due()
            raise StorageError(f"storage {what}: bypassed after repeated failures, next try in {self.breaker.retry_in():.1f} s")
        future = lane.submit(work)
        try:
            error = future.exception(deadline)
        except FutureTimeout:
            self._failed_read = read or self._failed_read
            self.breaker.trip()
            if future.cancel():
                raise StorageError(f"storage {what}: no thread was free within {deadline:g} s") from None
            raise StorageDeadlineError(
                f"storage {what}: no answer within {deadline:g} s", lambda call: future.add_done_callback(lambda _: call())
            ) from None
        if error is not None:
            self._failed_read = read or self._failed_read
            self.breaker.failure()
            raise _storage_error(what, error) from error
        self.breaker.success()
        return future.result()

    def _probe_when_due(self) -> None:
        with self._lock:
            if self._closed or (self._probe is not None and not self._probe.done()) or not self.breaker.allow():
                return
            self._probe = self._probes.submit(self._try)
        self._probe.add_done_callback(self._probed)

    def _try(self) -> None:
        """Look up, and read again what could not be read. Blocks for as long as the tier does."""
        self._tier.prefix([_PROBE_KEY], 0)
        read = self._failed_read
        if read is None or not read.nbytes:
            return
        buffer = memoryview(mmap.mmap(-1, read.nbytes))
        self._tier.register(buffer)
        try:
            for key in read.keys:  # which may lie with several owners
                self._tier.get([key], read.shard, [buffer])
        finally:
            self._tier.unregister(buffer)

    def _probed(self, probe: Future[None]) -> None:
        if probe.cancelled() or probe.exception() is not None:
            self.breaker.failure()
        else:
            self._failed_read = None
            self.breaker.success()


def _storage_error(what: str, error: BaseException) -> StorageError:
    return error if isinstance(error, StorageError) else StorageError(f"storage {what}: {type(error).__name__}: {error}")


class _Lane:
    """Daemon threads that work off a queue. (Those of `ThreadPoolExecutor` are waited for at the end of the process.)"""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._run, name=f"vcache-storage-{name}-{number}", daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def close(self) -> None:
        """Threads end after what they are doing and what is queued."""
        for _ in range(self._threads):
            self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                future.set_exception(error)
            else:
                future.set_result(result)
