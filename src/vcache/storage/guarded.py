"""Deadline and circuit breaker around any storage tier, so that it can never hold an engine up."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from ..errors import StorageDeadlineError, StorageError
from ..keys import CacheKey
from ..manager.breaker import CircuitBreaker
from .base import StorageTier

T = TypeVar("T")


class GuardedStorage(StorageTier):
    """Runs another tier's calls in threads of its own. A call that outlasts the deadline is left behind and raises; after
    some failures calls raise at once, until a probe succeeds. Reads (`prefix`, `get`) and writes (`put`, `remove`) have
    threads of their own, so that a slow write does not delay a look-up."""

    def __init__(self, tier: StorageTier, deadline: float, *, breaker: CircuitBreaker | None = None, threads: int = 2) -> None:
        """`deadline`: seconds that a read may take; writes, which nobody waits for, may take ten times as long."""
        self._tier = tier
        self._deadline = deadline
        self.breaker = breaker or CircuitBreaker(time.monotonic, threshold=2, cooldown=1.0, jitter=random.random)
        self._reads = ThreadPoolExecutor(threads, thread_name_prefix="vcache-storage-read")
        self._writes = ThreadPoolExecutor(1, thread_name_prefix="vcache-storage-write")
        self._lock = threading.Lock()
        self._closed = False

    def prefix(self, keys: Sequence[CacheKey], shard: int) -> int:
        return self._call(self._reads, "look-up", self._deadline, lambda: self._tier.prefix(keys, shard))

    def get(self, keys: Sequence[CacheKey], shard: int, buffers: Sequence[memoryview]) -> list[int]:
        return self._call(self._reads, "get", self._deadline, lambda: self._tier.get(keys, shard, buffers))

    def put(self, keys: Sequence[CacheKey], shard: int, values: Sequence[memoryview]) -> list[bool]:
        return self._call(self._writes, "put", 10 * self._deadline, lambda: self._tier.put(keys, shard, values))

    def remove(self, keys: Sequence[CacheKey], shard: int) -> None:
        self._call(self._writes, "remove", 10 * self._deadline, lambda: self._tier.remove(keys, shard))

    def register(self, buffer: memoryview) -> None:
        self._tier.register(buffer)

    def unregister(self, buffer: memoryview) -> None:
        self._tier.unregister(buffer)

    def close(self) -> None:
        """Give the tier's own close the deadline; what still hangs then is left to the end of the process."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._reads.shutdown(wait=False, cancel_futures=True)
        self._writes.shutdown(wait=False, cancel_futures=True)
        closer = threading.Thread(target=self._tier.close, name="vcache-storage-close", daemon=True)
        closer.start()
        closer.join(self._deadline)

    def _call(self, executor: ThreadPoolExecutor, what: str, deadline: float, work: Callable[[], T]) -> T:
        if not self.breaker.allow():
            raise StorageError(f"storage {what}: bypassed after repeated failures, next try in {self.breaker.retry_in():.1f} s")
        try:
            future: Future[T] = executor.submit(work)
        except RuntimeError:
            raise StorageError(f"storage {what}: already closed") from None
        try:
            result = future.result(deadline)
        except FutureTimeout:
            self.breaker.trip()
            if future.cancel():
                raise StorageError(f"storage {what}: no thread was free within {deadline:g} s") from None
            raise StorageDeadlineError(
                f"storage {what}: no answer within {deadline:g} s", lambda call: future.add_done_callback(lambda _: call())
            ) from None
        except StorageError:
            self.breaker.failure()
            raise
        self.breaker.success()
        return result
