"""`ChunkStorage`: named chunks between a paged KV cache and the storage tier, verified like slots of the pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack

from ..config import StorageConfig
from ..errors import VCacheError
from ..keys import CacheKey, Chunk
from ..metrics import EngineMetrics
from ..paged.mover import Rows, SlotTransfer
from ..segment.slot_protocol import complete_header
from ..segment.slots import HEADER_BYTES, SlotHeader
from ..storage.base import StorageTier
from ..storage.values import is_intact, value_bytes
from .buffers import Pinning, SlotBuffer
from .pool import ChunkPool
from .storage_writer import Spiller, StorageBuffers, StorageWriter

logger = logging.getLogger("vcache.storage")

_DIRECT_GENERATION = 2
"""Generation of values that never were in a slot: the smallest even one above 0."""


class ChunkStorage:
    """Loads chunks from a storage tier, and has them written to it. Thread-safe. Everything that fails here is a miss plus a
    counter."""

    def __init__(
        self,
        storage: StorageTier,
        pool: ChunkPool,
        metrics: EngineMetrics,
        config: StorageConfig,
        pinning: Pinning | None = None,
    ) -> None:
        """Owns `storage`: `close` closes it. `pinning`: makes buffers reachable for the GPU."""
        self._storage = storage
        self._pool = pool
        self._metrics = metrics
        self._config = config
        room = max(1, config.queue // (pool.slot_bytes + HEADER_BYTES))
        self._buffers = StorageBuffers.open(pool.slot_bytes, room, storage, pinning)
        self.spiller: Spiller | None = None
        """Writes what is about to be evicted; None unless `storage.write` says so."""
        if config.write == "eviction":
            self.spiller = Spiller(storage, pool.segments, self._buffers.spills, metrics)
        self._writer: StorageWriter | None = None
        if config.write != "never":
            self._writer = StorageWriter(storage, pool, self._buffers, metrics, config.queue, patience=config.deadline)

    def prefix(self, digests: Sequence[bytes]) -> int:
        """Number of leading digests in storage; 0 when it fails. Blocks up to the tier's deadline."""
        try:
            return self._storage.prefix(self._keys(digests), self._pool.spec.rank) if digests else 0
        except Exception as error:  # noqa: BLE001 - a miss, whatever a binding raises
            self._failed("prefix", error)
            return 0

    def load(self, chunks: Sequence[Chunk], rows: Rows, parent: bytes = b"") -> int:
        """Bring the longest prefix of `chunks` that storage holds into the paged cache; number of verified chunks. Blocks.

        `parent`: digest of the chunk before the first, empty when not known; it only helps eviction after a promotion."""
        found = self.prefix([chunk.digest for chunk in chunks])
        loaded = 0
        while loaded < found:
            count = self._load_some(chunks[loaded:found], rows)
            if not count:
                break
            loaded += count
        if self._config.promote and loaded:
            self._put_above(chunks[:loaded], parent, rows)
        return loaded

    def save_later(self, chunks: Sequence[Chunk]) -> None:
        """Queue chunks that were just stored in the pool, unless they are written on eviction. Does not block."""
        if self._writer is not None and self._config.write == "through":
            self._writer.submit(chunks)

    def save_now(self, chunks: Sequence[Chunk], rows: Rows) -> None:
        """Gather chunks that found no slot into buffers and queue them. Blocks for the copy; drops, counted, what finds no
        free buffer: an engine never waits for storage."""
        if self._writer is None:
            return
        for position, chunk in enumerate(chunks):
            buffers = self._buffers.gathers.take(1, timeout=0)
            if not buffers:
                self._metrics.count("storage_dropped", len(chunks) - position)
                return
            if self._gather(chunk, buffers[0], rows):
                self._writer.submit_filled(chunk, buffers[0])
            else:
                self._buffers.gathers.give(buffers)

    def flush(self, timeout: float | None = None) -> bool:
        """Block until queued writes are done; False on timeout (seconds)."""
        return self._writer is None or self._writer.flush(timeout)

    def close(self, timeout: float) -> None:
        """Write what waits, at most `timeout` seconds. Idempotent."""
        with ExitStack() as stack:  # all of them, whatever one raises; the last one first
            stack.callback(self._storage.close)
            stack.callback(self._buffers.close)
            if self._writer is not None:
                stack.callback(self._writer.close, timeout)

    def _put_above(self, chunks: Sequence[Chunk], parent: bytes, rows: Rows) -> None:
        """Chunks that are whole in the paged cache go into the pool from there, where there is room for them."""
        if chunks[0].skip:  # its head was left alone
            parent, chunks = chunks[0].digest, chunks[1:]
        if chunks:
            report = self._pool.put(chunks, parent, rows).result()
            self._metrics.count("storage_promoted", len(report.stored))

    def _load_some(self, chunks: Sequence[Chunk], rows: Rows) -> int:
        began = time.perf_counter()
        try:
            buffers = self._buffers.reads.take(len(chunks), self._config.deadline)
            if not buffers:
                self._metrics.count("storage_busy")
                return 0
            with self._buffers.reads.giving_back(buffers):
                chunks = chunks[: len(buffers)]
                keys = self._keys([chunk.digest for chunk in chunks])
                sizes = self._storage.get(keys, self._pool.spec.rank, [buffer.view for buffer in buffers])
                transfers: list[SlotTransfer] = []
                for chunk, buffer, size in zip(chunks, buffers, sizes, strict=True):
                    header = self._valid_header(chunk, buffer, size)
                    if header is None:
                        break
                    transfers.append(SlotTransfer(buffer.slot, header, chunk.start, chunk.skip))
                if not transfers:
                    return 0
                transfer = rows.load(transfers)
                transfer.wait()
                verified = transfer.verified()
            good = next((i for i, ok in enumerate(verified) if not ok), len(verified))
            nbytes = sum(self._pool.spec.payload_bytes(chunk.tokens - chunk.skip) for chunk in chunks[:good])
            self._metrics.observe("retrieve", "storage", time.perf_counter() - began, nbytes)
            self._metrics.count("retrieve_chunks", good)
            self._metrics.count("retrieve_tokens", sum(chunk.tokens - chunk.skip for chunk in chunks[:good]))
            return good
        except Exception as error:  # noqa: BLE001 - a miss, whatever a binding or a compiler raises
            self._failed("get", error)
            return 0

    def _valid_header(self, chunk: Chunk, buffer: SlotBuffer, size: int) -> SlotHeader | None:
        """The value's own header, if it names exactly this chunk and the value is whole (rule I1); None is a miss. A value that
        can never be read is removed, or it would keep its chunk from being written again."""
        if size < 0:
            self._metrics.count("storage_unreadable")
            return None
        header = complete_header(buffer.view[:HEADER_BYTES])
        expected = self._pool.header(chunk, header.generation) if header is not None else None
        if header is None or header != expected or size != value_bytes(header.payload_bytes):
            self._metrics.count("storage_invalid")
        elif is_intact(buffer.view[:size]):
            return header
        else:
            self._metrics.count("storage_damaged")
            logger.warning("a value in storage is damaged: its checksum is wrong; the chunk is a miss")
        if self._writer is not None:
            self._writer.remove(chunk)
        return None

    def _gather(self, chunk: Chunk, buffer: SlotBuffer, rows: Rows) -> bool:
        buffer.view[:HEADER_BYTES] = bytes(HEADER_BYTES)  # or the mover would respect the last use's generation
        transfer = SlotTransfer(buffer.slot, self._pool.header(chunk, _DIRECT_GENERATION), chunk.start)
        try:
            moved = rows.store([transfer], self._pool.manager.client_id)
            moved.wait()
            return moved.verified() == [True]
        except Exception as error:  # noqa: BLE001 - as for loads
            self._failed("gather", error)
            return False

    def _keys(self, digests: Sequence[bytes]) -> list[CacheKey]:
        return [CacheKey(self._pool.namespace, digest) for digest in digests]

    def _failed(self, what: str, error: Exception) -> None:
        self._metrics.count("storage_errors")
        expected = isinstance(error, VCacheError)
        logger.log(logging.DEBUG if expected else logging.WARNING, "storage %s: %s", what, error, exc_info=not expected)
