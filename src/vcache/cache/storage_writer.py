"""The background writer: brings chunks to the storage tier, from the pool or from staging. Bounded; never blocks an engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import StorageDeadlineError
from ..keys import CacheKey, Chunk
from ..metrics import EngineMetrics
from ..storage.base import StorageTier
from ..storage.values import seal
from .buffers import Staging, StagingBuffer
from .pool import ChunkPool, leased

logger = logging.getLogger("vcache.storage")

BATCH = 4
"""Chunks written in one call: in a busy process every call waits several times for the interpreter lock."""


class _Job(NamedTuple):
    chunk: Chunk
    nbytes: int
    filled: StagingBuffer | None
    """Holds header and payload already; None when they are to be read from the pool."""
    damaged: bool = False
    """Nothing is written: what storage holds is to be removed."""

    @property
    def alone(self) -> bool:
        """Whether it does not go into a batch with others."""
        return self.filled is not None or self.damaged


class BackgroundWriter:
    """One thread and a queue of chunks. When more than `limit` payload bytes wait, further chunks are dropped and counted."""

    def __init__(
        self,
        storage: StorageTier,
        pool: ChunkPool,
        staging: Staging,
        metrics: EngineMetrics,
        limit: int,
        patience: float,
    ) -> None:
        """`patience`: seconds to wait for buffers that an earlier write has not given back."""
        self._storage = storage
        self._pool = pool
        self._staging = staging
        self._metrics = metrics
        self._limit = limit
        self._patience = patience
        self._batch = min(BATCH, staging.writes.limit)
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
        """Queue a chunk whose header and payload lie in a buffer for gathers; the writer gives it back. Does not block."""
        if not self._enqueue(_Job(chunk, self._pool.spec.payload_bytes(chunk.tokens), buffer)):
            self._staging.gathers.give([buffer])

    def remove(self, chunk: Chunk) -> None:
        """Queue the removal of a damaged value, so that the chunk can be written again. Does not block."""
        self._enqueue(_Job(chunk, 0, None, damaged=True))

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
            self._staging.gathers.give([job.filled for job in self._queue if job.filled is not None])
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
            except Exception as error:  # noqa: BLE001 - the thread goes on, or `flush` would wait for ever
                # These chunks are missing in this tier, nothing else. The first of many is news, the others are counted.
                self._metrics.count("storage_errors")
                level = logging.DEBUG if self._failing else logging.WARNING
                logger.log(level, "write to the storage tier failed: %s", error)
                self._failing = True

    def _next(self) -> list[_Job]:
        """The next jobs, oldest first, taken out of the queue: one that goes alone, or several to read from the pool, each
        chunk once. Under `_changed`."""
        jobs: list[_Job] = []
        while self._queue and len(jobs) < self._batch:
            job = self._queue[0]
            if jobs and (job.alone or any(job.chunk.digest == other.chunk.digest for other in jobs)):
                break
            jobs.append(self._queue.popleft())
            self._waiting_bytes -= job.nbytes
            if job.alone:
                break
        return jobs

    def _write(self, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        shard = self._pool.spec.rank
        if jobs[0].damaged:
            self._storage.remove(self._keys(jobs), shard)
            return
        filled = jobs[0].filled
        buffers = [filled] if filled is not None else []
        staging = self._staging.gathers if filled is not None else self._staging.writes
        try:
            there = self._storage.prefix(self._keys(jobs), shard)
            if there:
                self._metrics.count("storage_exists", there)
            jobs = jobs[there:]
            while jobs:
                if len(jobs) > len(buffers) and filled is None:
                    buffers += staging.take(len(jobs) - len(buffers), self._patience if not buffers else 0)
                if not buffers:
                    self._metrics.count("storage_dropped", len(jobs))
                    return
                ready, jobs = jobs[: len(buffers)], jobs[len(buffers) :]
                here = [True] if filled is not None else self._read(ready, buffers)
                self._put(ready, buffers, here, shard, began)
                began = time.perf_counter()
        except StorageDeadlineError as error:
            # The call still reads from its buffers.
            late, buffers = buffers, []
            error.when_over(lambda: staging.give(late))
            raise
        finally:
            staging.give(buffers)

    def _put(self, jobs: list[_Job], buffers: list[StagingBuffer], here: list[bool], shard: int, began: float) -> None:
        """Write those that are `here`; the others were evicted before their turn."""
        found = [(job, seal(buffer.view, job.nbytes)) for job, buffer, ok in zip(jobs, buffers, here, strict=False) if ok]
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

    def _read(self, jobs: list[_Job], buffers: list[StagingBuffer]) -> list[bool]:
        """Whether each chunk's header and payload are in its buffer now; False for those that left the pool."""
        here: list[bool] = []
        while len(here) < len(jobs):
            # A lease ends before the first chunk that is gone.
            with leased(self._pool, [job.chunk.digest for job in jobs[len(here) :]]) as lease:
                for location in lease.locations:
                    job, buffer = jobs[len(here)], buffers[len(here)]
                    here.append(self._pool.read(location, job.chunk, buffer.view) > 0)
            if len(here) < len(jobs):
                here.append(False)
        return here

    def _keys(self, jobs: Sequence[_Job]) -> list[CacheKey]:
        return [CacheKey(self._pool.namespace, job.chunk.digest) for job in jobs]
