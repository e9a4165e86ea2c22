"""Slots in memory of other hosts: read one-sided into host buffers, verified, and moved on into the paged cache."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from ..metrics import EngineMetrics
from ..paged.mover import Rows, SlotTransfer, Transfer
from ..segment.mapping import RemoteSlot
from ..segment.slot_protocol import proved
from ..segment.slots import HEADER_BYTES, SlotHeader, align_up
from .buffers import BufferPool, Pinning, SlotBuffer
from .remote_lenders import EngineFactory, RemoteLender, RemoteLenders
from .transfer import StreamFollower

logger = logging.getLogger("vcache.remote")

BUFFER_BYTES = 256 * 2**20
"""Host memory for reads under way, within the limits that follow."""
MIN_BUFFERS, MAX_BUFFERS = 4, 64
PROOF_BYTES = 2 * HEADER_BYTES
"""At the end of a buffer: what was read after the payload."""


class RemoteRead(NamedTuple):
    """One chunk shard to bring from another host into the paged cache. Fields as in `SlotTransfer`."""

    slot: RemoteSlot
    header: SlotHeader
    start: int
    skip: int = 0


class RemoteReader:
    """Reads slots of other hosts into the paged cache. Thread-safe. Everything that fails here is a miss plus a counter, and
    nothing takes longer than its deadline: reads run in threads of their own, those from different lenders side by side."""

    def __init__(
        self,
        payload_bytes: int,
        make_engine: EngineFactory,
        alive: Callable[[], Collection[bytes]],
        *,
        deadline: float,
        pinning: Pinning | None = None,
        limit: int | None = None,
    ) -> None:
        """`payload_bytes`: of a full chunk. `alive`: UUIDs of the segments known now. `deadline`: seconds for reading one batch
        of slots, some dozen MiB, from a lender, and for buffers to do so. `pinning`: makes buffers reachable for the GPU.
        `limit`: buffers in use at a time."""
        fitting = BUFFER_BYTES // (payload_bytes + HEADER_BYTES)
        limit = limit or min(MAX_BUFFERS, max(MIN_BUFFERS, fitting))
        nbytes = HEADER_BYTES + align_up(payload_bytes, HEADER_BYTES) + PROOF_BYTES
        self._buffers = BufferPool(nbytes, limit, pinning=pinning)
        self._lenders = RemoteLenders(make_engine, alive)
        self._deadline = deadline
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False

    def load(self, reads: Sequence[RemoteRead], rows: Rows, metrics: EngineMetrics) -> RemoteTransfer:
        """Start bringing leased slots into the paged cache, in the order of the prompt: what follows a slot that failed is left
        out. Does not wait for other hosts; the work follows the current CUDA stream."""
        transfer = RemoteTransfer(reads)
        groups: dict[bytes, list[int]] = {}
        for index, read in enumerate(reads):
            groups.setdefault(read.slot.segment, []).append(index)
        with self._changed:
            if self._closed:
                return transfer
            self._running += len(groups)
        transfer.expect(len(groups))
        for indices in groups.values():
            job = _Job(transfer, reads, indices, rows, metrics, self._lenders, self._buffers, self._deadline)
            try:
                follower = StreamFollower(rows.target.cache.device)
                threading.Thread(target=self._run, args=(job, follower), name="vcache-remote", daemon=True).start()
            except Exception as error:  # noqa: BLE001 - no thread to be had, or the GPU failed
                self._over(job, error)
        return transfer

    def close(self, timeout: float = 5.0) -> None:
        """No more reads. Waits at most `timeout` seconds for those under way, and a second for each lender that was read from.
        Idempotent."""
        with self._changed:
            self._closed = True
            over = self._changed.wait_for(lambda: not self._running, timeout)
        if not over:
            logger.warning("reads from other hosts still run after %.1f s; they are left behind", timeout)
        # Engines first: with them ends the last write to a buffer.
        self._lenders.close()
        self._buffers.close()

    def _run(self, job: _Job, follower: StreamFollower) -> None:
        failure: Exception | None = None
        try:
            follower.run(job.run)
        except Exception as error:  # noqa: BLE001 - a miss, whatever an engine or a compiler raises
            failure = error
        finally:
            self._over(job, failure)

    def _over(self, job: _Job, failure: Exception | None) -> None:
        if failure is not None:
            job.metrics.count("remote_errors")
            logger.warning("read from another host failed, treated as a miss: %s", failure)
        with self._changed:
            self._running -= 1
            self._changed.notify_all()
        job.transfer.part_over()


class RemoteTransfer(Transfer):
    """Reads under way. `verified` is False for whatever did not arrive; nothing raises. Once done, nothing of it touches the
    paged cache any more, whatever the network still delivers."""

    def __init__(self, reads: Sequence[RemoteRead]) -> None:
        self._reads = reads
        self._flags = [False] * len(reads)
        self._changed = threading.Condition()
        self._parts = 0
        self.first_failed = len(reads)
        """Nothing behind this one is worth reading."""
        self.stale: list[bytes] = []
        """Keys whose slots held something else than was promised."""

    def done(self) -> bool:
        return not self._parts

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(self.done, timeout)

    def verified(self) -> list[bool]:
        return list(self._flags)

    def expect(self, parts: int) -> None:
        self._parts = parts

    def part_over(self) -> None:
        with self._changed:
            self._parts -= 1
            self._changed.notify_all()

    def arrived(self, index: int) -> None:
        self._flags[index] = True

    def failed(self, index: int, *, stale: bool = False) -> None:
        with self._changed:
            self.first_failed = min(self.first_failed, index)
            if stale:
                self.stale.append(self._reads[index].header.key)


class _Batch(NamedTuple):
    """Chunks on their way from buffers into the paged cache."""

    transfer: Transfer
    indices: list[int]
    buffers: list[SlotBuffer]


class _Job:
    """The part of one load that comes from one lender. Runs in one thread."""

    def __init__(
        self,
        transfer: RemoteTransfer,
        reads: Sequence[RemoteRead],
        indices: list[int],
        rows: Rows,
        metrics: EngineMetrics,
        lenders: RemoteLenders,
        buffers: BufferPool,
        deadline: float,
    ) -> None:
        self.transfer = transfer
        self.metrics = metrics
        self._reads = reads
        self._indices = indices
        self._rows = rows
        self._lenders = lenders
        self._buffers = buffers
        self._deadline = deadline
        self._token_bytes = rows.target.cache.spec.token_bytes
        self._moving: deque[_Batch] = deque()

    def run(self) -> None:
        """Read in batches of half of the buffers: one is on its way into the cache while the next one is read."""
        began = time.perf_counter()
        first = self._reads[self._indices[0]].slot
        position = 0
        try:
            lender = self._lenders.find(first)
            if not lender.usable(first):
                self.metrics.count("remote_bypassed", len(self._indices))
                return
            while position < len(self._indices) and self._indices[position] < self.transfer.first_failed:
                taken = self._take(len(self._indices) - position)
                batch = self._indices[position : position + len(taken)]
                if not batch or not self._read(lender, batch, taken):
                    self.metrics.count("remote_errors")
                    break
                position += len(batch)
        finally:
            if position < len(self._indices):
                self.transfer.failed(self._indices[position])
            while self._moving:
                self._finish()
            self._observe(time.perf_counter() - began)

    def _take(self, wanted: int) -> list[SlotBuffer]:
        buffers = self._buffers
        wanted = min(wanted, max(1, buffers.limit // 2))
        taken = buffers.take(wanted, timeout=0)
        while not taken and self._moving:
            # Two loads that wait for each other's buffers would wait for ever.
            self._finish()
            taken = buffers.take(wanted, timeout=0)
        return taken or buffers.take(wanted, timeout=self._deadline)

    def _read(self, lender: RemoteLender, batch: list[int], taken: list[SlotBuffer]) -> bool:
        """Read the chunks `batch` and send those that are good on their way. False when the lender could not be read."""
        until = time.monotonic() + self._deadline
        reads = [self._reads[index] for index in batch]
        for buffer in taken:
            _blank(buffer)
        # Headers and payloads first, in any order: that a payload was complete before is what the lease says. Then the headers
        # again, in a call that begins when all of that has landed.
        targets, sources, sizes = [], [], []
        for buffer, read in zip(taken, reads, strict=True):
            targets += [buffer.address, buffer.address + HEADER_BYTES]
            sources += [read.slot.header, read.slot.payload]
            sizes += [HEADER_BYTES, read.header.payload_bytes]
        proofs = [buffer.address + _proof_offset(buffer) for buffer in taken]
        proofs += [proof + HEADER_BYTES for proof in proofs]
        headers = [*(read.slot.header for read in reads), *(read.slot.slab for read in reads)]
        arrived = False
        try:
            arrived = lender.read(taken, targets, sources, sizes, until) and lender.read(
                taken, proofs, headers, [HEADER_BYTES] * len(headers), until
            )
        finally:
            if not arrived:
                self._lenders.retire(lender.engine, taken)
                self._buffers.retire(taken)
        if not arrived:
            return False
        good: list[int] = []
        for index, read, buffer in zip(batch, reads, taken, strict=True):
            if not _proves(buffer, read.header):
                self.metrics.count("remote_stale")
                self.transfer.failed(index, stale=True)
                break
            good.append(index)
        # Both copies of the header are in host memory that is ours: the mover's own check of it cannot fail any more.
        transfers = [
            SlotTransfer(buffer.slot, read.header, read.start, read.skip)
            for buffer, read in zip(taken[: len(good)], reads, strict=False)
        ]
        if not transfers:
            self._buffers.give(taken)
            return True
        try:
            self._moving.append(_Batch(self._rows.load(transfers), good, taken))
        except BaseException:
            self._buffers.give(taken)
            raise
        if len(self._moving) > 1:
            self._finish()
        return True

    def _finish(self) -> None:
        """Wait until the oldest batch is in the paged cache."""
        batch = self._moving.popleft()
        try:
            batch.transfer.wait()
            for index, ok in zip(batch.indices, batch.transfer.verified(), strict=True):
                if ok:
                    self.transfer.arrived(index)
                else:
                    self.transfer.failed(index)
        except Exception as error:  # noqa: BLE001 - a miss, whatever a compiler raises
            self.metrics.count("transfer_errors")
            self.transfer.failed(batch.indices[0])
            logger.warning("transfer failed, treated as a miss: %s", error)
        finally:
            self._buffers.give(batch.buffers)

    def _observe(self, seconds: float) -> None:
        flags = self.transfer.verified()
        arrived = [self._reads[index] for index in self._indices if flags[index]]
        if not arrived:
            return
        tokens = sum(read.header.tokens - read.skip for read in arrived)
        self.metrics.count("retrieve_chunks", len(arrived))
        self.metrics.count("retrieve_tokens", tokens)
        self.metrics.observe("retrieve", "remote", seconds, tokens * self._token_bytes)


def _proof_offset(buffer: SlotBuffer) -> int:
    """Where in a buffer the slot's header lies, and behind it the slab's, as they are after the payload was read."""
    return buffer.slab.nbytes - PROOF_BYTES


def _blank(buffer: SlotBuffer) -> None:
    """Forget all headers: whatever is found there afterwards was read afterwards."""
    buffer.view[:HEADER_BYTES] = bytes(HEADER_BYTES)
    buffer.view[_proof_offset(buffer) :] = bytes(PROOF_BYTES)


def _proves(buffer: SlotBuffer, header: SlotHeader) -> bool:
    """Whether what was read proves the payload to be that of `header`."""
    proof = buffer.view[_proof_offset(buffer) :]
    return proved(buffer.view[:HEADER_BYTES], proof[:HEADER_BYTES], proof[HEADER_BYTES:], header)
