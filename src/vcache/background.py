"""The background writer: brings chunks to the storage tier, from the pool or from staging. Bounded; never blocks an engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from .errors import StorageDeadlineError, StorageError
from .keys import CacheKey
from .metrics import EngineMetrics
from .pool import Chunk, ChunkPool, leased
from .segment.slots import HEADER_BYTES
from .staging import StagingBuffer, StagingPool
from .storage.base import StorageTier

logger = logging.getLogger("vcache.storage")


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
        self._queue: deque[_Job] = deque()
        self._waiting_bytes = 0
        self._busy = False
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
                job = self._queue.popleft()
                self._waiting_bytes -= job.nbytes
                self._busy = True
            try:
                self._write(job)
            except (StorageError, OSError, RuntimeError) as error:
                # This chunk is missing in this tier, nothing else.
                self._metrics.count("storage_errors")
                logger.warning("write to the storage tier failed: %s", error)

    def _write(self, job: _Job) -> None:
        began = time.perf_counter()
        buffers = [job.filled] if job.filled is not None else self._staging.take(1)
        try:
            key, shard = CacheKey(self._pool.namespace, job.chunk.digest), self._pool.spec.rank
            if self._storage.prefix([key], shard):
                self._metrics.count("storage_exists")
                return
            size = HEADER_BYTES + job.nbytes if job.filled is not None else self._read(job.chunk, buffers[0])
            if not size:
                self._metrics.count("storage_skipped")  # evicted before its turn
            elif self._storage.put([key], shard, [buffers[0].view[:size]]) == [True]:
                self._metrics.observe("store", "storage", time.perf_counter() - began, job.nbytes)
                self._metrics.count("storage_written")
            else:
                self._metrics.count("storage_rejected")
        except StorageDeadlineError as error:
            # The call still reads from its buffer.
            late, buffers = buffers, []
            error.when_over(lambda: self._staging.give(late))
            raise
        finally:
            self._staging.give(buffers)

    def _read(self, chunk: Chunk, buffer: StagingBuffer) -> int:
        with leased(self._pool, [chunk.digest]) as lease:
            return self._pool.read(lease.locations[0], chunk, buffer.view) if lease.locations else 0
