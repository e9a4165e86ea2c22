"""Writes chunks to the storage tier before they are evicted, whoever stored them: what `storage.write: eviction` is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ..errors import StorageDeadlineError, StorageError
from ..keys import CacheKey
from ..manager.api import Spill
from ..metrics import EngineMetrics
from ..segment.mapping import SegmentMap
from ..segment.slot_protocol import SourceSlot, read_slot, slot_header
from ..segment.slots import HEADER_BYTES
from ..storage.base import StorageTier
from ..storage.values import TRAILER_BYTES, seal, value_bytes
from .buffers import StagingBuffer, StagingPool

logger = logging.getLogger("vcache.storage")

SPILL_BUFFERS = 4
"""Staging buffers of a spiller, apart from those that look-ups use: nobody waits for a spill."""


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
    """Used by one thread. Everything that fails here leaves a chunk where it was."""

    def __init__(self, storage: StorageTier, segments: SegmentMap, staging: StagingPool, metrics: EngineMetrics) -> None:
        """`staging`: for nobody but this spiller; larger values than its buffers hold are skipped. Closed by `close`."""
        self._storage = storage
        self._segments = segments
        self._staging = staging
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

    def close(self) -> None:
        """After the last `write`, before the storage tier is closed."""
        self._staging.close()

    def _write_some(self, spills: Sequence[Spill], done: set[tuple[bytes, int]]) -> int:
        """Write as many shards as there are buffers; the number dealt with. Adds to `done` what is in storage."""
        began = time.perf_counter()
        with self._buffers(len(spills)) as buffers:
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

    def _read(self, spill: Spill, buffer: StagingBuffer, done: set[tuple[bytes, int]]) -> _Value | None:
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

    @contextmanager
    def _buffers(self, count: int) -> Iterator[list[StagingBuffer]]:
        buffers = self._staging.take(count, timeout=0)
        if not buffers:
            raise StorageError("an earlier write has not ended yet")
        try:
            yield buffers
        except StorageDeadlineError as error:
            # The call still reads from them.
            late, buffers = buffers, []
            error.when_over(lambda: self._staging.give(late))
            raise
        finally:
            self._staging.give(buffers)
