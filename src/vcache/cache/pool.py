"""`ChunkPool`: named chunks between a paged KV cache and slots of the VRAM/DRAM pool.

This is the engine below tokens and masks: it knows digests, leases, tickets and slots. Integrations that have keys of their
own (vLLM's block hashes) use it directly. A failure of the manager, a lender or a slot is a miss plus a counter.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from ..errors import TRANSFER_ERRORS, ManagerError
from ..keys import Chunk
from ..manager.api import Placement, PutGrant, PutRequest, Ticket
from ..manager.client import Manager
from ..metrics import EngineMetrics
from ..paged.checksum import TRAILER_BYTES, ChecksumMode, contradicts, slot_bytes_for, trailer_offset
from ..paged.columns import SlotColumns
from ..paged.layout import device_name
from ..paged.mover import Rows, SlotTransfer, Transfer
from ..segment.gate import Passage
from ..segment.mapping import PinnedSlab, PinnedSlot, SegmentMap
from ..segment.slot_protocol import PinnedMemory, carries, mend_format, still_carries
from ..segment.slots import ALIGNMENT, HEADER_BYTES, Locations, SlabHeader, SlotHeader, SlotLocation, Tier, align_up
from ..spec import KVCacheSpec
from .leased_slots import Naming, ReachedSlots, reach
from .remote_reads import RemoteRead, RemoteReader, RemoteTransfer
from .transfer import JoinedTransfer, PoolTransfer

logger = logging.getLogger("vcache.pool")

HEAD_CHUNKS = 32
"""Chunks of a long load that are launched first: with 32 MiB each, half a millisecond of work for a GPU."""

SAMPLED = 1 / 64
"""Part of the loads that `checksum: sample` verifies."""

MAX_BROKEN = 4096
"""Chunks remembered as broken."""


class PutReport(NamedTuple):
    """What became of the chunks of one `put`."""

    stored: list[Chunk]
    """Written and published now."""
    unplaced: list[Chunk]
    """Not written: no space, no reachable segment, or the manager is away."""
    nbytes: int
    seconds: float = 0.0
    """How long the bytes took to move (`Transfer.seconds`)."""


class Presence(NamedTuple):
    """Answer of `ChunkPool.lookup`."""

    found: int
    """Leading digests that are present."""
    failed: bool = False
    """The manager could not be asked: what was not found may exist."""


class Lease(NamedTuple):
    """Right to read the slots of a prefix. Release it with `ChunkPool.release`, or hand it to `load`."""

    id: int
    """0: nothing is leased."""
    locations: Sequence[SlotLocation]
    failed: bool = False
    """The manager could not be asked."""


class ChunkPool:
    """Thread-safe. Owns nothing: manager, segments and mover are given and closed by the caller."""

    def __init__(
        self,
        manager: Manager,
        segments: SegmentMap,
        spec: KVCacheSpec,
        chunk_size: int,
        metrics: EngineMetrics,
        *,
        placement: Placement = "local",
        namespace: bytes | None = None,
        remote: RemoteReader | None = None,
        checksum: ChecksumMode = "off",
    ) -> None:
        """`remote`: reads slots on other hosts; without it they cannot be reached. `checksum`: `CacheConfig.checksum`.
        `namespace` replaces `spec.namespace(chunk_size)` where the shards of a chunk differ in size (pipeline stages)."""
        self.manager = manager
        self.segments = segments
        self.spec = spec
        self.namespace = namespace or spec.namespace(chunk_size)
        payload_bytes = spec.payload_bytes(chunk_size)
        self.slot_bytes = slot_bytes_for(payload_bytes, checksum)
        self._sealed = align_up(slot_bytes_for(payload_bytes, "always"), ALIGNMENT)
        """Length of slots that carry a checksum, whoever wrote them."""
        self.naming = Naming(spec, self.namespace, (align_up(payload_bytes, ALIGNMENT), self._sealed))
        self._verifies = {"off": 0.0, "sample": SAMPLED, "always": 1.0}[checksum]
        self._token_bytes = spec.token_bytes
        self.metrics = metrics
        self.placement = placement
        self._remote = remote
        self._writes = 0
        self._writes_changed = threading.Condition()
        self._loads = 0
        self._loads_changed = threading.Condition()
        self._broken: OrderedDict[bytes, None] = OrderedDict()
        self._broken_lock = threading.Lock()

    # -- reading ---------------------------------------------------------------------------------------------------

    def lookup(self, digests: Sequence[bytes]) -> Presence:
        """How much of a prefix is in VRAM or DRAM. Blocks for one round trip."""
        try:
            return Presence(self.manager.lookup(digests))
        except ManagerError as error:
            self._manager_failed("lookup", error)
            return Presence(0, failed=True)

    def tier(self, digest: bytes) -> int:
        """Tell where a chunk is: 0 for VRAM, 1 for DRAM, -1 for neither. Not a use of it. Blocks for one round trip."""
        try:
            return self.manager.tiers([digest])[0]
        except ManagerError as error:
            self._manager_failed("tiers", error)
            return -1

    def acquire(self, digests: Sequence[bytes], within: float | None = None) -> Lease:
        """Lease the longest present prefix. Blocks for one round trip; at most `within` seconds, where that is given."""
        try:
            reply = self.manager.acquire(digests, self.spec.rank, within=within)
        except ManagerError as error:
            self._manager_failed("acquire", error)
            return Lease(0, [], failed=True)
        return Lease(reply.lease, reply.locations)

    def release(self, lease: int) -> None:
        """Give a lease back. Does not block; a lost message costs only the time until the lease expires."""
        try:
            self.manager.release(lease)
        except ManagerError as error:
            self._manager_failed("release", error)

    def load(self, lease: Lease, chunks: Sequence[Chunk], rows: Rows) -> PoolTransfer[list[bool]]:
        """Start moving leased chunks into a paged cache. The result tells which chunks are there **and verified**.

        `chunks[i]` belongs to `lease.locations[i]`. Moves the part before the first slot that this process cannot reach. The
        lease is given back when settled.
        """
        with self._loads_changed:
            self._loads += 1
        try:
            return _Load(self, lease, chunks).start(rows)
        except BaseException:
            self._load_over()
            raise

    def wait_loads(self, timeout: float | None = None) -> bool:
        """Block until no load is under way (one is, until it is settled); False on timeout (seconds)."""
        with self._loads_changed:
            return self._loads_changed.wait_for(lambda: not self._loads, timeout)

    def _load_over(self) -> None:
        with self._loads_changed:
            self._loads -= 1
            self._loads_changed.notify_all()

    def read(self, location: SlotLocation, chunk: Chunk, out: memoryview) -> int:
        """Copy header and payload of a leased slot into host memory `out`; bytes written, 0 when unreachable or stale.
        Blocks. This is how background writers feed the storage tier."""
        slot = self.segments.pin(location) if location.slot_bytes in self.naming.strides else None
        if slot is None:
            return 0
        try:
            memory, header = PinnedMemory(self.segments, slot.slab), self.header(chunk, location.generation)
            packed, total = header.pack(), HEADER_BYTES + header.payload_bytes
            if not carries(memory, slot.header_offset, packed):
                return 0
            out[:HEADER_BYTES] = packed
            self.segments.read_into(slot.slab, slot.payload_offset, out[HEADER_BYTES:total])
            at = self._trailer(slot, location) if self._verifies == 1 else 0
            trailer = memory.read(at, TRAILER_BYTES) if at else b""
            if not still_carries(memory, slot.header_offset, packed):
                return 0
            if at and contradicts(trailer, out[HEADER_BYTES:total], location.generation):
                self._distrust([location.segment])
                return 0
            return total
        finally:
            self.segments.unpin(slot)

    # -- writing ---------------------------------------------------------------------------------------------------

    def put(self, chunks: Sequence[Chunk], parent: bytes, rows: Rows) -> PoolTransfer[PutReport]:
        """Start storing consecutive chunks of one prompt; those that exist are skipped before a byte is copied.

        `parent`: digest of the chunk before the first, empty for none. The result settles after `put_end`.
        """
        return _Put(self, chunks).start(parent, rows)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A write is in flight inside: begin before tickets are asked for, end after they have ended (`set_write_gate`)."""
        self._write_begins()
        try:
            yield
        finally:
            self._write_over()

    def no_writes(self) -> bool:
        """Whether no write is in flight: what a client promises when it says hello (rule I3)."""
        return self._writes == 0

    def wait_writes(self, timeout: float | None = None) -> bool:
        """Block until no write is in flight; False on timeout (seconds)."""
        with self._writes_changed:
            return self._writes_changed.wait_for(self.no_writes, timeout)

    # -- slots that hold something else than the manager says ------------------------------------------------------

    def mark_broken(self, digests: Sequence[bytes]) -> None:
        """Chunks that failed verification: the next `put` drops them first, or it would be told that they exist. Does not
        block."""
        with self._broken_lock:
            self._broken |= dict.fromkeys(digests)
            while len(self._broken) > MAX_BROKEN:
                self._broken.popitem(last=False)

    def broken(self, digests: Sequence[bytes]) -> list[bytes]:
        """Those of `digests` that are marked."""
        return [digest for digest in digests if digest in self._broken] if self._broken else []

    def drop_broken(self, digests: Sequence[bytes]) -> None:
        """Take marked chunks out of the directory, so that they can be stored again. Blocks for the lenders' answers, at most
        the manager's deadline and two seconds. Chunks that somebody leases stay, until they fail again.

        Another copy may have been stored meanwhile; to drop that one costs a miss, not more."""
        dropped = self._unmark(digests)
        if dropped:
            logger.info("%d chunks whose slots hold something else are dropped from the pool", len(dropped))
            try:
                self.manager.remove(dropped)
            except ManagerError as error:
                self._manager_failed("remove", error)

    def _unmark(self, digests: Sequence[bytes]) -> list[bytes]:
        """Those that were marked."""
        with self._broken_lock:
            found = self.broken(digests)
            for digest in found:
                del self._broken[digest]
        return found

    # -- helpers ---------------------------------------------------------------------------------------------------

    def header(self, chunk: Chunk, generation: int) -> SlotHeader:
        """The complete slot header of a chunk of this engine. Pure."""
        digest, position, tokens, _, _ = chunk
        nbytes = self._token_bytes * tokens
        return SlotHeader(self.spec.rank, self.spec.world_size, generation, digest, self.namespace, nbytes, tokens, position)

    def _trailer(self, slot: PinnedSlot, location: SlotLocation) -> int:
        """Offset of the trailer in the slot's slab; 0 when it has none, or this engine ignores it."""
        if not self._verifies or location.slot_bytes != self._sealed:
            return 0
        return trailer_offset(slot.payload_offset, location.slot_bytes)

    def _with_trailers(self, found: ReachedSlots) -> SlotColumns:
        """The slots of a load, and which trailers of theirs it verifies."""
        slots = found.columns
        if self._verifies:
            chosen = found.units == self._sealed // ALIGNMENT
            if self._verifies < 1:
                chosen &= np.array([random.random() < self._verifies for _ in range(len(slots))], bool)
            for at in np.flatnonzero(chosen).tolist():
                slots.trailer[at] = trailer_offset(int(slots.payload_offset[at]), self._sealed)
        return slots

    def _distrust(self, damaged: Sequence[int]) -> None:
        """The segments of these numbers delivered chunks with wrong checksums, one each."""
        self.metrics.count("checksum_failures", len(damaged))
        for number in sorted(set(damaged)):
            self.segments.distrust(number, f"{damaged.count(number)} of its chunks had a wrong checksum")

    def _put_start(self, chunks: Sequence[Chunk], parent: bytes, device: str) -> list[PutGrant]:
        if not chunks:
            return []
        keys = [chunk.digest for chunk in chunks]
        if self._broken:
            self.drop_broken(keys)
        request = PutRequest(
            keys=keys,
            namespace=self.namespace,
            parent=parent,
            first_index=chunks[0].position,
            tokens=[chunk.tokens for chunk in chunks],
            slot_bytes=self.slot_bytes,
            shard=self.spec.rank,
            num_shards=self.spec.world_size,
            placement=self.placement,
            device=device,
            avoid=self.segments.unreachable(),
        )
        try:
            return self.manager.put_start(request)
        except ManagerError as error:
            self._manager_failed("put_start", error)
            return [PutGrant("no_space") for _ in chunks]

    def _put_end(self, tickets: list[Ticket]) -> set[bytes]:
        """Digests of the chunks that are published."""
        if not tickets:
            return set()
        try:
            answers = self.manager.put_end(tickets)
        except ManagerError as error:
            self._manager_failed("put_end", error)
            return set()
        return {ticket.key for ticket, ok in zip(tickets, answers, strict=True) if ok}

    def _revoke(self, tickets: list[Ticket]) -> None:
        if not tickets:
            return
        try:
            self.manager.put_revoke(tickets)
        except ManagerError as error:
            self._manager_failed("put_revoke", error)

    def _start(self, launch: Callable[[], Transfer]) -> Transfer | None:
        try:
            return launch()
        except TRANSFER_ERRORS as error:
            self.metrics.count("transfer_errors")
            logger.warning("transfer not started, treated as a miss: %s", error)
            return None

    def _observe(self, operation: Literal["store", "retrieve"], moved: _Moved, seconds: float) -> None:
        total = moved.vram + moved.dram
        if not moved.chunks:
            return
        self.metrics.count(f"{operation}_chunks", moved.chunks)
        self.metrics.count(f"{operation}_tokens", total)
        tiers: tuple[tuple[Tier, int], ...] = (("vram", moved.vram), ("dram", moved.dram))
        for tier, count in tiers:
            if count:
                # The tiers of a mixed transfer share its time by their bytes.
                self.metrics.observe(operation, tier, seconds * count / total, self._token_bytes * count)

    def _write_begins(self) -> None:
        with self._writes_changed:
            self._writes += 1

    def _write_over(self) -> None:
        with self._writes_changed:
            self._writes -= 1
            self._writes_changed.notify_all()

    def _manager_failed(self, verb: str, error: Exception) -> None:
        self.metrics.count("manager_errors")
        logger.debug("%s: %s", verb, error)


@dataclass
class _Moved:
    """What has been moved, of one operation."""

    chunks: int = 0
    vram: int = 0
    """Tokens from or to it."""
    dram: int = 0

    def add(self, slots: SlotColumns, flags: Sequence[bool]) -> None:
        """Count those of `slots` whose flag is True; there may be fewer flags."""
        kept = np.flatnonzero(np.array(flags, bool))
        tokens = (slots.tokens - slots.skip)[kept]
        in_vram = np.array([slab.kind == "cuda" for slab in slots.slabs], bool)[slots.slab[kept]]
        self.chunks += len(kept)
        self.vram += int(tokens[in_vram].sum())
        self.dram += int(tokens[~in_vram].sum())


@contextmanager
def leased(pool: ChunkPool, digests: Sequence[bytes]) -> Iterator[Lease]:
    """Hold a lease for the duration of a block."""
    lease = pool.acquire(digests)
    try:
        yield lease
    finally:
        if lease.id:
            pool.release(lease.id)


class _Load:
    """One load: the slots that are pinned for it, and what is left to do when their bytes have landed."""

    def __init__(self, pool: ChunkPool, lease: Lease, chunks: Sequence[Chunk]) -> None:
        self._pool = pool
        self._lease = lease
        self._chunks = chunks
        self._began = time.perf_counter()
        self._mapped: list[tuple[SlotColumns, range]] = []
        """Slots in mapped memory, and their positions in the load."""
        self._pinned: list[PinnedSlab] = []
        """Where `_mapped` lies."""
        self._reads: list[RemoteRead] = []
        self._read_places: list[int] = []
        self._remote: RemoteTransfer | None = None
        self._whole = JoinedTransfer([], None)

    def start(self, rows: Rows) -> PoolTransfer[list[bool]]:
        """Start what can be reached."""
        self._reach()
        parts: list[tuple[Transfer, Sequence[int]]] = []
        for slots, places in self._mapped:
            started = self._pool._start(partial(rows.load, slots))
            if started is None:
                # Nothing behind this place is worth reading from another host.
                kept = sum(place < places[0] for place in self._read_places)
                del self._reads[kept:], self._read_places[kept:]
                break
            parts.append((started, places))
        self._remote = self._start_remote(rows)
        self._whole = JoinedTransfer(parts, None if self._remote is None else (self._remote, self._read_places))
        return PoolTransfer(self._whole if parts or self._remote is not None else None, self._settle)

    def _reach(self) -> None:
        """Take in the slots of the lease, up to the first one that this process cannot reach: pinned ones, and those that only
        a transfer engine reaches."""
        pool, segments = self._pool, self._pool.segments
        locations = Locations.of(self._lease.locations)
        count, done = min(len(locations), len(self._chunks)), 0
        while done < count:
            found = reach(segments, pool.naming, locations[done:count], self._chunks[done:count])
            self._pinned.extend(found.pinned)
            if len(found.columns):
                self._mapped.append((pool._with_trailers(found), range(done, done + len(found.columns))))
                done += len(found.columns)
            before = done
            while done < count and (read := self._elsewhere(locations[done], self._chunks[done])) is not None:
                self._reads.append(read)
                self._read_places.append(done)
                done += 1
            if done == before and done < count:
                pool.metrics.count("unreachable")
                return

    def _elsewhere(self, location: SlotLocation, chunk: Chunk) -> RemoteRead | None:
        """How to read a chunk from another host; None when it is not there, or cannot be."""
        pool = self._pool
        slot = pool.segments.remote(location) if pool._remote is not None else None
        # Where a payload lies depends on the slots' size; that of this namespace's chunks is known.
        if slot is None or location.tokens != chunk.tokens or location.slot_bytes not in pool.naming.strides:
            return None
        return RemoteRead(slot, pool.header(chunk, location.generation), chunk.start, chunk.skip)

    def _start_remote(self, rows: Rows) -> RemoteTransfer | None:
        pool = self._pool
        if not self._reads or pool._remote is None:
            return None
        try:
            return pool._remote.load(self._reads, rows, pool.metrics)
        except TRANSFER_ERRORS as error:
            pool.metrics.count("transfer_errors")
            logger.warning("read from another host not started, treated as a miss: %s", error)
            return None

    def _settle(self, verified: list[bool]) -> list[bool]:
        pool, chunks = self._pool, self._chunks
        pool._load_over()
        pool.segments.unpin_all(pinned.slab for pinned in self._pinned)
        pool.release(self._lease.id)
        seen = [place for _, places in self._mapped for place in places if place < len(verified)]
        stale = [chunks[place].digest for place in seen if not verified[place]]
        damaged = [self._lease.locations[place].segment for place in self._whole.damaged()]
        if damaged:
            pool._distrust(damaged)
        if len(stale) > len(damaged):
            pool.metrics.count("stale_reads", len(stale) - len(damaged))
        if broken := [*stale, *(self._remote.stale if self._remote is not None else ())]:
            pool.mark_broken(broken)
        elif pool._broken:
            pool._unmark([chunk.digest for chunk, ok in zip(chunks, verified, strict=False) if ok])
        moved = _Moved()
        for slots, places in self._mapped:
            moved.add(slots, verified[places.start : places.stop])
        pool._observe("retrieve", moved, (self._whole.mapped_at or time.perf_counter()) - self._began)
        return [*verified, *[False] * (len(chunks) - len(verified))]


class _Put:
    """One put: what is written to which slot, and what its end publishes."""

    def __init__(self, pool: ChunkPool, chunks: Sequence[Chunk]) -> None:
        self._pool = pool
        self._chunks = chunks
        self._began = time.perf_counter()
        self._passage = Passage()
        self._written: list[Chunk] = []
        self._transfers: list[SlotTransfer] = []
        """Of `_written`, one for one: slots pinned, gates passed."""
        self._unplaced: list[Chunk] = []
        self._started: Transfer | None = None

    def start(self, parent: bytes, rows: Rows) -> PoolTransfer[PutReport]:
        """Ask for tickets, and start writing where they say."""
        pool = self._pool
        pool._write_begins()
        try:
            epoch = pool.manager.epoch
            grants = pool._put_start(self._chunks, parent, device_name(rows.target.cache.device))
            self._place(grants)
            if pool.manager.epoch != epoch:
                # The manager that gave the tickets is gone. Nothing rests on this look (the gate is what holds such writes
                # back), but nobody would take the bytes any more.
                self._abandon()
            if self._transfers:
                self._started = pool._start(partial(rows.store, self._transfers, pool.manager.client_id))
        except BaseException:
            self._settle([])
            raise
        return PoolTransfer(self._started, self._settle)

    def _place(self, grants: Sequence[PutGrant]) -> None:
        """Pin the slots that were granted, and pass their gates."""
        pool, segments = self._pool, self._pool.segments
        refused: list[Ticket] = []
        for chunk, grant in zip(self._chunks, grants, strict=True):
            location = grant.location
            if grant.status != "granted" or location is None:
                pool.metrics.count(f"put_{grant.status}")
                if grant.status == "no_space":
                    self._unplaced.append(chunk)
                continue
            slot = segments.pin(location)
            if slot is None or not self._passage.admits(slot.slab, grant.fence):
                if slot is not None:
                    # The manager that gave the ticket is gone, or has learned of the segment anew.
                    segments.unpin(slot)
                pool.metrics.count("unreachable" if slot is None else "put_lapsed")
                refused.append(Ticket(chunk.digest, pool.spec.rank, location.generation))
                self._unplaced.append(chunk)
                continue
            slab = SlabHeader(grant.format_generation, location.slot_bytes, grant.slots).pack()
            header, trailer = pool.header(chunk, location.generation), pool._trailer(slot, location) if pool._verifies else 0
            self._transfers.append(SlotTransfer(slot, header, chunk.start, 0, slab, trailer))
            self._written.append(chunk)
        pool._revoke(refused)

    def _abandon(self) -> None:
        """Write nothing."""
        self._unplaced += self._written
        for transfer in self._transfers:
            self._pool.segments.unpin(transfer.slot)
        self._pool.metrics.count("put_lapsed", len(self._transfers))
        self._transfers.clear()
        self._written.clear()

    def _settle(self, verified: list[bool]) -> PutReport:
        pool, transfers = self._pool, self._transfers
        try:
            flags = [*verified, *[False] * (len(transfers) - len(verified))]
            try:
                self._mend_slab_headers([transfer for transfer, ok in zip(transfers, flags, strict=True) if not ok])
            finally:
                # Out of the gates before the tickets end: whoever gets these slots next must not wait for us.
                self._passage.leave()
                for transfer in transfers:
                    pool.segments.unpin(transfer.slot)
            stored = self._publish(flags)
            # Not the time until somebody asks, nor that of the forward pass which the copy waits for.
            seconds = self._started.seconds if self._started is not None else 0.0
            moved = _Moved()
            moved.add(SlotColumns.of(transfers), flags)
            pool._observe("store", moved, seconds or time.perf_counter() - self._began)
            nbytes = sum(t.header.payload_bytes for t, ok in zip(transfers, flags, strict=True) if ok)
            return PutReport(stored, self._unplaced, nbytes, seconds)
        finally:
            pool._write_over()

    def _mend_slab_headers(self, refused: Sequence[SlotTransfer]) -> None:
        """Rewrite slab headers that kept writes away by a later format than the tickets'. Inside the gate there is none: a slab
        is not formatted anew while one of its tickets is out, and tickets of earlier mounts do not get in. So the header is
        damaged, and would keep every writer away for good."""
        segments, metrics = self._pool.segments, self._pool.metrics
        try:
            for slab, header in {transfer.slot.slab: transfer.slab_header for transfer in refused}.items():
                if mend_format(PinnedMemory(segments, slab), header):
                    metrics.count("slab_headers_mended")
                    logger.warning("slab %d on %s: its header was damaged, and is mended", slab.index, slab.device)
        except TRANSFER_ERRORS as error:
            metrics.count("transfer_errors")
            logger.warning("slab headers cannot be looked at: %s", error)

    def _publish(self, flags: list[bool]) -> list[Chunk]:
        """End the tickets; the chunks that can be found from now on."""
        pool = self._pool
        tickets = [Ticket(t.header.key, t.header.shard, t.header.generation) for t in self._transfers]
        pool._revoke([ticket for ticket, ok in zip(tickets, flags, strict=True) if not ok])
        published = pool._put_end([ticket for ticket, ok in zip(tickets, flags, strict=True) if ok])
        if len(published) < len(tickets):
            pool.metrics.count("put_lapsed", len(tickets) - len(published))
        return [chunk for chunk in self._written if chunk.digest in published]
