"""Writes chunks to the storage tier: in the background once they are stored, and before they are evicted. No engine waits."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import StorageError
from ..keys import CacheKey, Chunk
from ..manager.api import Spill
from ..metrics import EngineMetrics
from ..segment.mapping import SegmentMap
from ..segment.slot_protocol import SourceSlot, read_slot, slot_header
from ..segment.slots import HEADER_BYTES
from ..storage.base import StorageTier
from ..storage.values import TRAILER_BYTES, seal, value_bytes
from .buffers import BufferPool, Pinning, SlotBuffer
from .pool import ChunkPool, leased

logger = logging.getLogger("vcache.storage")

BUFFER_LIMITS = (8, 4, 8, 4)
"""Of `StorageBuffers`: bounds host memory, and is enough to fill batched gets and puts."""
BATCH = 4
"""Chunks written in one call: in a busy process every call waits several times for the interpreter lock."""


class StorageBuffers(NamedTuple):
    """The host buffers between an engine and its storage tier, apart for each use: none of them ever waits for another one's.
    A buffer holds one value."""

    reads: BufferPool
    """From storage to the paged cache."""
    writes: BufferPool
    """From the pool to storage."""
    gathers: BufferPool
    """From the paged cache to storage: what found no room in the pool."""
    spills: BufferPool
    """From the pool to storage, before an eviction."""

    @classmethod
    def open(cls, payload_bytes: int, limit: int, storage: StorageTier, pinning: Pinning | None = None) -> StorageBuffers:
        """`payload_bytes`: of the largest value. `limit`: buffers of each kind, at most. `pinning`: makes them reachable for
        the GPU."""
        nbytes = value_bytes(payload_bytes)
        return cls(*(BufferPool(nbytes, min(most, limit), registry=storage, pinning=pinning) for most in BUFFER_LIMITS))

    def close(self) -> None:
        """As `BufferPool.close`."""
        for pool in self:
            pool.close()


class _Job(NamedTuple):
    chunk: Chunk
    nbytes: int
    filled: SlotBuffer | None
    """Holds header and payload already; None when they are to be read from the pool."""
    damaged: bool = False
    """Nothing is written: what storage holds is to be removed."""

    @property
    def alone(self) -> bool:
        """Whether it does not go into a batch with others."""
        return self.filled is not None or self.damaged


class StorageWriter:
    """Writes chunks in a thread of its own, in the order of a queue. When more than `limit` payload bytes wait, further chunks
    are dropped and counted."""

    def __init__(
        self,
        storage: StorageTier,
        pool: ChunkPool,
        buffers: StorageBuffers,
        metrics: EngineMetrics,
        limit: int,
        patience: float,
    ) -> None:
        """`patience`: seconds to wait for buffers that an earlier write has not given back."""
        self._storage = storage
        self._pool = pool
        self._buffers = buffers
        self._metrics = metrics
        self._limit = limit
        self._patience = patience
        self._batch = min(BATCH, buffers.writes.limit)
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

    def submit_filled(self, chunk: Chunk, buffer: SlotBuffer) -> None:
        """Queue a chunk whose header and payload lie in a buffer for gathers; the writer gives it back. Does not block."""
        if not self._enqueue(_Job(chunk, self._pool.spec.payload_bytes(chunk.tokens), buffer)):
            self._buffers.gathers.give([buffer])

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
            self._buffers.gathers.give([job.filled for job in self._queue if job.filled is not None])
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
        pool = self._buffers.gathers if filled is not None else self._buffers.writes
        with pool.giving_back(buffers):
            there = self._storage.prefix(self._keys(jobs), shard)
            if there:
                self._metrics.count("storage_exists", there)
            jobs = jobs[there:]
            while jobs:
                if len(jobs) > len(buffers) and filled is None:
                    buffers += pool.take(len(jobs) - len(buffers), self._patience if not buffers else 0)
                if not buffers:
                    self._metrics.count("storage_dropped", len(jobs))
                    return
                ready, jobs = jobs[: len(buffers)], jobs[len(buffers) :]
                here = [True] if filled is not None else self._read(ready, buffers)
                self._put(ready, buffers, here, shard, began)
                began = time.perf_counter()

    def _put(self, jobs: list[_Job], buffers: list[SlotBuffer], here: list[bool], shard: int, began: float) -> None:
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

    def _read(self, jobs: list[_Job], buffers: list[SlotBuffer]) -> list[bool]:
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


class SpillReport(NamedTuple):
    """What became of a plan."""

    keys: list[bytes]
    """Chunks that are in storage with all their shards."""
    failed: bool
    """Storage did not work: more of the same would fail, too."""


class _Value(NamedTuple):
    """A shard in a staging buffer."""

    key: CacheKey
    shard: int
    view: memoryview


class Spiller:
    """Writes chunks that are about to be evicted, whoever stored them: what `storage.write: eviction` is. Used by one thread.
    Everything that fails here leaves a chunk where it was."""

    def __init__(self, storage: StorageTier, segments: SegmentMap, buffers: BufferPool, metrics: EngineMetrics) -> None:
        """`buffers`: for nobody but this spiller; larger values than they hold are skipped."""
        self._storage = storage
        self._segments = segments
        self._buffers = buffers
        self._metrics = metrics

    def write(self, spills: Sequence[Spill], stopped: Callable[[], bool]) -> SpillReport:
        """Bring shards of any namespace to storage, each verified by its header before and after it was read; those that
        are there already are not written again. Ends early when `stopped`. Blocks; raises nothing for a miss."""
        done: set[tuple[bytes, int]] = set()
        failed, position = False, 0
        try:
            while position < len(spills) and not stopped():
                position += self._write_some(spills[position:], done)
        except Exception as error:  # noqa: BLE001 - whatever a binding raises, its chunks stay where they are
            failed = True
            self._metrics.count("spill_errors")
            logger.warning("storage takes no chunks that are about to be evicted: %s", error)
        missing = {spill.key for spill in spills if (spill.key, spill.shard) not in done}
        return SpillReport([key for key in dict.fromkeys(spill.key for spill in spills) if key not in missing], failed)

    def _write_some(self, spills: Sequence[Spill], done: set[tuple[bytes, int]]) -> int:
        """Write as many shards as there are buffers; the number dealt with. Adds to `done` what is in storage."""
        began = time.perf_counter()
        buffers = self._buffers.take(len(spills), timeout=0)
        if not buffers:
            raise StorageError("an earlier write has not ended yet")
        with self._buffers.giving_back(buffers):
            values = []
            for spill, buffer in zip(spills, buffers, strict=False):
                value = self._read(spill, buffer, done)
                if value is not None:
                    values.append(value)
            accepted, nbytes = 0, 0
            for shard in sorted({value.shard for value in values}):
                batch = [value for value in values if value.shard == shard]
                flags = self._storage.put([value.key for value in batch], shard, [value.view for value in batch])
                for value, ok in zip(batch, flags, strict=True):
                    self._metrics.count("spilled_chunks" if ok else "spill_skipped")
                    if ok:
                        accepted, nbytes = accepted + 1, nbytes + len(value.view) - HEADER_BYTES - TRAILER_BYTES
                        done.add((value.key.digest, shard))
            if accepted:
                self._metrics.observe("spill", "storage", time.perf_counter() - began, nbytes)
            return len(buffers)

    def _read(self, spill: Spill, buffer: SlotBuffer, done: set[tuple[bytes, int]]) -> _Value | None:
        """Header and payload in the buffer; None when the shard is in storage (then it is `done`), stale or out of reach."""
        slot = self._segments.pin(spill.source)
        if slot is None:
            self._metrics.count("unreachable")
            return None
        try:
            source = SourceSlot(slot, spill.source, spill.key, spill.shard)
            header = slot_header(self._segments, source)
            if header is not None and value_bytes(header.payload_bytes) <= buffer.view.nbytes:
                key = CacheKey(header.namespace, header.key)
                if self._storage.prefix([key], header.shard):
                    done.add((spill.key, spill.shard))
                    return None
                if read_slot(self._segments, source, header, buffer.view):
                    return _Value(key, header.shard, seal(buffer.view, header.payload_bytes))
            self._metrics.count("spill_skipped")
            return None
        finally:
            self._segments.unpin(slot)
