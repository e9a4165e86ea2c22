"""The background writer: brings chunks to the storage tier, from the pool or from staging. Bounded; never blocks an engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from .errors import StorageDeadlineError
from .keys import CacheKey
from .metrics import EngineMetrics
from .pool import TRANSFER_ERRORS, Chunk, ChunkPool, leased
from .segment.slots import HEADER_BYTES
from .staging import StagingBuffer, StagingPool
from .storage.base import StorageTier

logger = logging.getLogger("vcache.storage")

BATCH = 4
"""Chunks written in one call: in a busy process every call waits several times for the interpreter lock."""


class _Job(NamedTuple):
    chunk: Chunk
    nbytes: int
    filled: StagingBuffer | None
    """Holds the value already; None when it is to be read from the pool."""


class BackgroundWriter:
    """One thread and a queue of chunks. When more than `limit` payload bytes wait, further chunks are dropped and counted."""

    def __init__(self, storage: StorageTier, pool: ChunkPool, staging: StagingPool, metrics: EngineMetrics, limit: int) -> None:
        self._storage = storage
        self._pool = pool
        self._staging = staging
        self._metrics = metrics
        self._limit = limit
        # The other half is for reads, which must not wait for writes.
        self._batch = max(1, min(BATCH, staging.limit // 2))
        self._queue: deque[_Job] = deque()
        self._waiting_bytes = 0
        self._busy = False
        self._failing = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="vcache-storage-writer", daemon=True)
        self._thread.start()

    def submit(self, chunks: Sequence[Chunk]) -> None:
        """Queue chunks that are in the pool now. Does not block."""
        for chunk in chunks:
            self._enqueue(_Job(chunk, self._pool.spec.payload_bytes(chunk.tokens), None))

    def submit_filled(self, chunk: Chunk, buffer: StagingBuffer) -> None:
        """Queue a value that lies in a staging buffer; the writer gives the buffer back. Does not block."""
        if not self._enqueue(_Job(chunk, self._pool.spec.payload_bytes(chunk.tokens), buffer)):
            self._staging.give([buffer])

    def flush(self, timeout: float | None = None) -> bool:
        """Block until nothing waits; False on timeout (seconds)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self, timeout: float) -> None:
        """Write what waits, at most `timeout` seconds; drop the rest, counted. Idempotent."""
        self.flush(timeout)
        with self._changed:
            self._closed = True
            if self._queue:
                self._metrics.count("storage_dropped", len(self._queue))
            self._staging.give([job.filled for job in self._queue if job.filled is not None])
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(timeout)

    def _enqueue(self, job: _Job) -> bool:
        with self._changed:
            if self._closed or self._waiting_bytes + job.nbytes > self._limit:
                self._metrics.count("storage_dropped")
                return False
            self._queue.append(job)
            self._waiting_bytes += job.nbytes
            self._changed.notify_all()
            return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                jobs = self._next()
                self._busy = True
            try:
                self._write(jobs)
                self._failing = False
            except TRANSFER_ERRORS as error:
                # These chunks are missing in this tier, nothing else. The first of many is news, the others are counted.
                self._metrics.count("storage_errors")
                level = logging.DEBUG if self._failing else logging.WARNING
                logger.log(level, "write to the storage tier failed: %s", error)
                self._failing = True

    def _next(self) -> list[_Job]:
        """The next jobs, oldest first, taken out of the queue: one whose value lies in staging, or several to read from the
        pool, each chunk once. Under `_changed`."""
        jobs: list[_Job] = []
        while self._queue and len(jobs) < self._batch:
            job = self._queue[0]
            if jobs and (job.filled is not None or any(job.chunk.digest == other.chunk.digest for other in jobs)):
                break
            jobs.append(self._queue.popleft())
            self._waiting_bytes -= job.nbytes
            if job.filled is not None:
                break
        return jobs

    def _write(self, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        filled = jobs[0].filled
        buffers = [filled] if filled is not None else []
        try:
            shard = self._pool.spec.rank
            there = self._storage.prefix(self._keys(jobs), shard)
            if there:
                self._metrics.count("storage_exists", there)
            jobs = jobs[there:]
            while jobs:
                if filled is None:
                    buffers += self._staging.take(len(jobs) - len(buffers))
                ready, jobs = jobs[: len(buffers)], jobs[len(buffers) :]
                sizes = [HEADER_BYTES + ready[0].nbytes] if filled is not None else self._read(ready, buffers)
                self._put(ready, buffers, sizes, shard, began)
                began = time.perf_counter()
        except StorageDeadlineError as error:
            # The call still reads from its buffers.
            late, buffers = buffers, []
            error.when_over(lambda: self._staging.give(late))
            raise
        finally:
            self._staging.give(buffers)

    def _put(self, jobs: list[_Job], buffers: list[StagingBuffer], sizes: list[int], shard: int, began: float) -> None:
        """Write what was read; a size of 0 is a chunk that was evicted before its turn."""
        found = [(job, buffer.view[:size]) for job, buffer, size in zip(jobs, buffers, sizes, strict=False) if size]
        if len(found) < len(jobs):
            self._metrics.count("storage_skipped", len(jobs) - len(found))
        if not found:
            return
        flags = self._storage.put(self._keys([job for job, _ in found]), shard, [value for _, value in found])
        written = [job for (job, _), ok in zip(found, flags, strict=True) if ok]
        if written:
            self._metrics.observe("store", "storage", time.perf_counter() - began, sum(job.nbytes for job in written))
            self._metrics.count("storage_written", len(written))
        if len(written) < len(found):
            self._metrics.count("storage_rejected", len(found) - len(written))

    def _read(self, jobs: list[_Job], buffers: list[StagingBuffer]) -> list[int]:
        """Bytes of each chunk's value, now in its buffer; 0 for those that left the pool."""
        sizes: list[int] = []
        while len(sizes) < len(jobs):
            # A lease ends before the first chunk that is gone.
            with leased(self._pool, [job.chunk.digest for job in jobs[len(sizes) :]]) as lease:
                for location in lease.locations:
                    here = len(sizes)
                    sizes.append(self._pool.read(location, jobs[here].chunk, buffers[here].view))
            if len(sizes) < len(jobs):
                sizes.append(0)
        return sizes

    def _keys(self, jobs: Sequence[_Job]) -> list[CacheKey]:
        return [CacheKey(self._pool.namespace, job.chunk.digest) for job in jobs]
