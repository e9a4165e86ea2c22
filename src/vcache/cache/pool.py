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
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

from ..errors import TRANSFER_ERRORS, ManagerRefusedError, ManagerUnavailableError, ProtocolError
from ..manager.api import Manager, Placement, PutGrant, PutRequest, Ticket
from ..metrics import EngineMetrics
from ..paged.checksum import TRAILER_BYTES, ChecksumMode, contradicts, slot_bytes_for, trailer_offset
from ..paged.layout import device_name
from ..paged.mover import Rows, SlotTransfer, Transfer
from ..segment.gate import Passage
from ..segment.mapping import MappedSlab, PinnedSlot, SegmentMap
from ..segment.slots import (
    ALIGNMENT,
    HEADER_BYTES,
    SlabHeader,
    SlotHeader,
    SlotLocation,
    Tier,
    align_up,
    formatted_since,
    outlived,
)
from ..spec import KVCacheSpec
from .remote_reads import RemotePool, RemoteRead, RemoteTransfer

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("vcache.pool")

T = TypeVar("T")
MANAGER_ERRORS = (ManagerUnavailableError, ManagerRefusedError, ProtocolError)
HEAD_CHUNKS = 32
"""Chunks of a long load that are launched first: with 32 MiB each, half a millisecond of work for a GPU."""

SAMPLED = 1 / 64
"""Part of the loads that `checksum: sample` verifies."""

MAX_BROKEN = 4096
"""Chunks remembered as broken."""


class Chunk(NamedTuple):
    """One chunk of a prompt, as moved by one call."""

    digest: bytes
    position: int
    """Chunks before it in the prompt."""
    tokens: int
    start: int
    """Index into the call's slot mapping of its first moved token."""
    skip: int = 0
    """Loads only: leading tokens that stay untouched."""


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
    locations: list[SlotLocation]
    failed: bool = False
    """The manager could not be asked."""


class JoinedTransfer(Transfer):
    """Several transfers as one, each of them with the places of its slots in the whole."""

    def __init__(self, mapped: Sequence[tuple[Transfer, Sequence[int]]], remote: tuple[Transfer, Sequence[int]] | None) -> None:
        """`remote` comes last, because it takes longest."""
        self._parts = [*mapped, remote] if remote is not None else list(mapped)
        self._mapped = len(mapped)
        self.mapped_at = 0.0
        """When the mapped part had arrived, by `time.perf_counter`, once waited for."""

    def done(self) -> bool:
        return all(part.done() for part, _ in self._parts)

    def wait(self, timeout: float | None = None) -> bool:
        """All of them, also when one breaks: what is still under way writes to the paged cache."""
        deadline = None if timeout is None else time.monotonic() + timeout
        failure: Exception | None = None
        for number, (part, _) in enumerate(self._parts, start=1):
            try:
                if not part.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    return False
            except TRANSFER_ERRORS as error:
                failure = failure or error
            if number == self._mapped:
                self.mapped_at = self.mapped_at or time.perf_counter()
        if failure is not None:
            raise failure
        return True

    def damaged(self) -> list[int]:
        return [places[index] for part, places in self._parts for index in part.damaged()]

    def verified(self) -> list[bool]:
        if len(self._parts) == self._mapped:
            return [flag for part, _ in self._parts for flag in part.verified()]
        flags = {place: flag for part, places in self._parts for place, flag in zip(places, part.verified(), strict=True)}
        return [flags.get(place, False) for place in range(max(flags, default=-1) + 1)]


class PoolTransfer(Generic[T]):
    """A batch under way. Its result is settled exactly once, by whoever waits first. Thread-safe."""

    def __init__(self, transfer: Transfer | None, settle: Callable[[list[bool]], T]) -> None:
        """`settle` gets one flag per transfer and runs once; all False when the transfer broke or is None."""
        self.transfer = transfer
        self._settle = settle
        self._lock = threading.Lock()
        self._results: list[T] = []

    def done(self) -> bool:
        """Whether the bytes landed. Does not block."""
        return self.transfer is None or self.transfer.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until settled; False on timeout (seconds)."""
        if self.transfer is not None and not self._results:
            try:
                if not self.transfer.wait(timeout):
                    return False
            except TRANSFER_ERRORS:
                pass  # `result` asks again and reports it.
        self.result()
        return True

    def result(self) -> T:
        """Settle if nobody has, and return the result. Blocks until the bytes landed; raises nothing."""
        with self._lock:
            if not self._results:
                verified: list[bool] = []
                if self.transfer is not None:
                    try:
                        self.transfer.wait()
                        verified = self.transfer.verified()
                    except TRANSFER_ERRORS as error:
                        logger.warning("transfer failed, treated as a miss: %s", error)
                self._results.append(self._settle(verified))
            return self._results[0]


class _Route(NamedTuple):
    """How the slots of one load are reached. Places are positions in the load."""

    mapped: list[SlotTransfer]
    mapped_places: list[int]
    slabs: list[MappedSlab]
    """Where `mapped` lies; pinned."""
    remote: list[RemoteRead]
    remote_places: list[int]

    def cut(self, place: int) -> None:
        """Read nothing from other hosts from `place` on."""
        count = sum(other < place for other in self.remote_places)
        del self.remote[count:], self.remote_places[count:]


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
        remote: RemotePool | None = None,
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
        self._strides = (align_up(payload_bytes, ALIGNMENT), self._sealed)
        self._verifies = {"off": 0.0, "sample": SAMPLED, "always": 1.0}[checksum]
        self._token_bytes = spec.token_bytes
        self.metrics = metrics
        self.placement = placement
        self._remote = remote
        self._writes = 0
        self._writes_changed = threading.Condition()
        self._broken: OrderedDict[bytes, None] = OrderedDict()
        self._broken_lock = threading.Lock()

    # -- reading ---------------------------------------------------------------------------------------------------

    def lookup(self, digests: Sequence[bytes]) -> Presence:
        """How much of a prefix is in VRAM or DRAM. Blocks for one round trip."""
        try:
            return Presence(self.manager.lookup(digests))
        except MANAGER_ERRORS as error:
            self._manager_failed("lookup", error)
            return Presence(0, failed=True)

    def acquire(self, digests: Sequence[bytes], *, lease: int = 0) -> Lease:
        """Lease the longest present prefix, or, with `lease`, locate this rank's shards under it. Blocks for one round trip."""
        try:
            reply = self.manager.acquire(digests, self.spec.rank, lease=lease)
        except MANAGER_ERRORS as error:
            self._manager_failed("acquire", error)
            return Lease(0, [], failed=True)
        return Lease(reply.lease, reply.locations)

    def release(self, lease: int) -> None:
        """Give a lease back. Does not block; a lost message costs only the time until the lease expires."""
        try:
            self.manager.release(lease)
        except MANAGER_ERRORS as error:
            self._manager_failed("release", error)

    def load(self, lease: Lease, chunks: Sequence[Chunk], rows: Rows, *, release: bool = True) -> PoolTransfer[list[bool]]:
        """Start moving leased chunks into a paged cache. The result tells which chunks are there **and verified**.

        `chunks[i]` belongs to `lease.locations[i]`. Moves the part before the first slot that this process cannot reach.
        With `release`, the lease is given back when settled.
        """
        began = time.perf_counter()
        route = _Route([], [], [], [], [])
        mapped: list[tuple[Transfer, Sequence[int]]] = []
        # The first part is under way while the rest is prepared.
        head = HEAD_CHUNKS if len(chunks) >= 2 * HEAD_CHUNKS else len(chunks)
        for begin, end in ((0, head), (head, len(chunks))):
            known = len(route.mapped)
            whole = self._route(lease.locations[begin:end], chunks[begin:end], begin, route)
            part, places = route.mapped[known:], route.mapped_places[known:]
            started = self._start(lambda part=part: rows.load(part), part)  # type: ignore[misc]
            if started is not None:
                mapped.append((started, places))
            elif part:
                route.cut(places[0])
                break
            if not whole:
                break
        remote = self._start_remote(route.remote, rows)
        joined = JoinedTransfer(mapped, None if remote is None else (remote, route.remote_places))

        def settle(verified: list[bool]) -> list[bool]:
            self.segments.unpin_all(route.slabs)
            if release:
                self.release(lease.id)
            flags = [verified[place] for place in route.mapped_places if place < len(verified)]
            stale = [transfer.header.key for transfer, ok in zip(route.mapped, flags, strict=False) if not ok]
            damaged = [lease.locations[place].segment for place in joined.damaged()]
            if damaged:
                self._distrust(damaged)
            if len(stale) > len(damaged):
                self.metrics.count("stale_reads", len(stale) - len(damaged))
            if broken := [*stale, *(remote.stale if remote is not None else ())]:
                self.mark_broken(broken)
            elif self._broken:
                self._unmark([chunk.digest for chunk, ok in zip(chunks, verified, strict=False) if ok])
            self._observe("retrieve", route.mapped, flags, (joined.mapped_at or time.perf_counter()) - began)
            return [*verified, *[False] * (len(chunks) - len(verified))]

        return PoolTransfer(joined if mapped or remote is not None else None, settle)

    def read(self, location: SlotLocation, chunk: Chunk, out: memoryview) -> int:
        """Copy header and payload of a leased slot into host memory `out`; bytes written, 0 when unreachable or stale.
        Blocks. This is how background writers feed the storage tier."""
        slot = self.segments.pin(location) if location.slot_bytes in self._strides else None
        if slot is None:
            return 0
        try:
            header = self.header(chunk, location.generation)
            packed = header.pack()
            size = len(packed)
            total = size + header.payload_bytes
            if self.segments.read(slot.slab, slot.header_offset, size) != packed:
                return 0
            out[:size] = packed
            self.segments.read_into(slot.slab, slot.payload_offset, out[size:total])
            at = self._trailer(slot, location) if self._verifies == 1 else 0
            trailer = self.segments.read(slot.slab, at, TRAILER_BYTES) if at else b""
            if self.segments.read(slot.slab, slot.header_offset, size) != packed:
                return 0
            if outlived(self.segments.read(slot.slab, 0, HEADER_BYTES), location.generation):
                return 0
            if at and contradicts(trailer, out[size:total], location.generation):
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
        began = time.perf_counter()
        with self._writes_changed:
            self._writes += 1
        passage = Passage()
        written: list[Chunk] = []
        transfers: list[SlotTransfer] = []

        def settle(verified: list[bool]) -> PutReport:
            try:
                flags = [*verified, *[False] * (len(transfers) - len(verified))]
                try:
                    self._mend_slab_headers([transfer for transfer, ok in zip(transfers, flags, strict=True) if not ok])
                finally:
                    # Out of the gates before the tickets end: whoever gets these slots next must not wait for us.
                    passage.leave()
                    for transfer in transfers:
                        self.segments.unpin(transfer.slot)
                stored = self._publish(written, transfers, flags)
                # Not the time until somebody asks, nor that of the forward pass which the copy waits for.
                seconds = started.seconds if started is not None else 0.0
                self._observe("store", transfers, flags, seconds or time.perf_counter() - began)
                nbytes = sum(t.header.payload_bytes for t, ok in zip(transfers, flags, strict=True) if ok)
                return PutReport(stored, unplaced, nbytes, seconds)
            finally:
                self._write_over()

        unplaced: list[Chunk] = []
        started: Transfer | None = None
        try:
            epoch = self.manager.epoch
            grants = self._put_start(chunks, parent, device_name(rows.target.cache.device))
            unplaced = self._place(chunks, grants, passage, written, transfers)
            if self.manager.epoch != epoch:
                # The manager that gave the tickets is gone. Nothing rests on this look (the gate is what holds such writes
                # back), but nobody would take the bytes any more.
                unplaced = [*unplaced, *written]
                self._abandon(transfers)
                written.clear()
            start = lambda: rows.store(transfers, self.manager.client_id)  # noqa: E731
            started = self._start(start, transfers)
        except BaseException:
            settle([])
            raise
        return PoolTransfer(started, settle)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A write is in flight inside: begin before tickets are asked for, end after they have ended (`set_write_gate`)."""
        with self._writes_changed:
            self._writes += 1
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
            except MANAGER_ERRORS as error:
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

    def _distrust(self, damaged: Sequence[int]) -> None:
        """The segments of these numbers delivered chunks with wrong checksums, one each."""
        self.metrics.count("checksum_failures", len(damaged))
        for number in sorted(set(damaged)):
            self.segments.distrust(number, f"{damaged.count(number)} of its chunks had a wrong checksum")

    def _route(self, locations: Sequence[SlotLocation], chunks: Sequence[Chunk], first: int, route: _Route) -> bool:
        """Add slots to `route`, up to the first one that this process cannot reach: pinned ones, and those that only a transfer
        engine reaches. `first`: place of the first. Whether all are reached."""
        count, done = min(len(locations), len(chunks)), 0
        strides, verifies = self._strides, self._verifies
        while done < count:
            pinned = self.segments.pin_prefix(locations[done:count])
            route.slabs.extend(pinned.slabs)
            for slot in pinned.slots:
                location, chunk = locations[done], chunks[done]
                if location.tokens != chunk.tokens or location.slot_bytes not in strides:
                    break
                header = self.header(chunk, location.generation)
                trailer = self._trailer(slot, location) if verifies and random.random() < verifies else 0
                route.mapped.append(SlotTransfer(slot, header, chunk.start, chunk.skip, b"", trailer))
                route.mapped_places.append(first + done)
                done += 1
            if done == count:
                break
            location, chunk = locations[done], chunks[done]
            elsewhere = self.segments.remote(location) if self._remote is not None else None
            # Where a payload lies depends on the slots' size; that of this namespace's chunks is known.
            if elsewhere is None or location.tokens != chunk.tokens or location.slot_bytes not in self._strides:
                self.metrics.count("unreachable")
                return False
            route.remote.append(RemoteRead(elsewhere, self.header(chunk, location.generation), chunk.start, chunk.skip))
            route.remote_places.append(first + done)
            done += 1
        return len(locations) >= len(chunks)

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
        except MANAGER_ERRORS as error:
            self._manager_failed("put_start", error)
            return [PutGrant("no_space") for _ in chunks]

    def _place(
        self,
        chunks: Sequence[Chunk],
        grants: Sequence[PutGrant],
        passage: Passage,
        written: list[Chunk],
        transfers: list[SlotTransfer],
    ) -> list[Chunk]:
        """Add what may be written to `written` and `transfers`, its slots pinned and their gates passed; the chunks that found
        no place."""
        unplaced: list[Chunk] = []
        refused: list[Ticket] = []
        for chunk, grant in zip(chunks, grants, strict=True):
            location = grant.location
            if grant.status != "granted" or location is None:
                self.metrics.count(f"put_{grant.status}")
                if grant.status == "no_space":
                    unplaced.append(chunk)
                continue
            slot = self.segments.pin(location)
            if slot is None or not passage.admits(slot.slab, grant.fence):
                if slot is not None:
                    # The manager that gave the ticket is gone, or has learned of the segment anew.
                    self.segments.unpin(slot)
                self.metrics.count("unreachable" if slot is None else "put_lapsed")
                refused.append(Ticket(chunk.digest, self.spec.rank, location.generation))
                unplaced.append(chunk)
                continue
            slab = SlabHeader(grant.format_generation, location.slot_bytes, grant.slots).pack()
            header, trailer = self.header(chunk, location.generation), self._trailer(slot, location) if self._verifies else 0
            transfers.append(SlotTransfer(slot, header, chunk.start, 0, slab, trailer))
            written.append(chunk)
        self._revoke(refused)
        return unplaced

    def _mend_slab_headers(self, refused: Sequence[SlotTransfer]) -> None:
        """Rewrite slab headers that kept writes away by a later format than the tickets'. Inside the gate there is none: a slab
        is not formatted anew while one of its tickets is out, and tickets of earlier mounts do not get in. So the header is
        damaged, and would keep every writer away for good."""
        try:
            for slab, header in {transfer.slot.slab: transfer.slab_header for transfer in refused}.items():
                if formatted_since(self.segments.read(slab, 0, HEADER_BYTES), header):
                    self.segments.write(slab, 0, header)
                    self.metrics.count("slab_headers_mended")
                    logger.warning("slab %d on %s: its header was damaged, and is mended", slab.index, slab.device)
        except TRANSFER_ERRORS as error:
            self.metrics.count("transfer_errors")
            logger.warning("slab headers cannot be looked at: %s", error)

    def _abandon(self, transfers: list[SlotTransfer]) -> None:
        for transfer in transfers:
            self.segments.unpin(transfer.slot)
        self.metrics.count("put_lapsed", len(transfers))
        transfers.clear()

    def _publish(self, written: list[Chunk], transfers: list[SlotTransfer], flags: list[bool]) -> list[Chunk]:
        tickets = [Ticket(t.header.key, t.header.shard, t.header.generation) for t in transfers]
        good = [ticket for ticket, ok in zip(tickets, flags, strict=True) if ok]
        self._revoke([ticket for ticket, ok in zip(tickets, flags, strict=True) if not ok])
        published: set[bytes] = set()
        if good:
            try:
                answers = self.manager.put_end(good)
                published = {ticket.key for ticket, ok in zip(good, answers, strict=True) if ok}
            except MANAGER_ERRORS as error:
                self._manager_failed("put_end", error)
        if len(published) < len(transfers):
            self.metrics.count("put_lapsed", len(transfers) - len(published))
        return [chunk for chunk in written if chunk.digest in published]

    def _revoke(self, tickets: list[Ticket]) -> None:
        if not tickets:
            return
        try:
            self.manager.put_revoke(tickets)
        except MANAGER_ERRORS as error:
            self._manager_failed("put_revoke", error)

    def _start_remote(self, reads: list[RemoteRead], rows: Rows) -> RemoteTransfer | None:
        if not reads or self._remote is None:
            return None
        try:
            return self._remote.load(reads, rows, self.metrics)
        except TRANSFER_ERRORS as error:
            self.metrics.count("transfer_errors")
            logger.warning("read from another host not started, treated as a miss: %s", error)
            return None

    def _start(self, launch: Callable[[], Transfer], transfers: list[SlotTransfer]) -> Transfer | None:
        if not transfers:
            return None
        try:
            return launch()
        except TRANSFER_ERRORS as error:
            self.metrics.count("transfer_errors")
            logger.warning("transfer not started, treated as a miss: %s", error)
            return None

    def _observe(
        self, operation: Literal["store", "retrieve"], transfers: list[SlotTransfer], flags: list[bool], seconds: float
    ) -> None:
        moved = [transfer for transfer, ok in zip(transfers, flags, strict=False) if ok]
        if not moved:
            return
        total = sum(transfer.header.tokens - transfer.skip for transfer in moved)
        vram = sum(transfer.header.tokens - transfer.skip for transfer in moved if transfer.slot.slab.kind == "cuda")
        self.metrics.count(f"{operation}_chunks", len(moved))
        self.metrics.count(f"{operation}_tokens", total)
        tiers: tuple[tuple[Tier, int], ...] = (("vram", vram), ("dram", total - vram))
        for tier, count in tiers:
            if count:
                # The tiers of a mixed transfer share its time by their bytes.
                self.metrics.observe(operation, tier, seconds * count / total, self._token_bytes * count)

    def _write_over(self) -> None:
        with self._writes_changed:
            self._writes -= 1
            self._writes_changed.notify_all()

    def _manager_failed(self, verb: str, error: Exception) -> None:
        self.metrics.count("manager_errors")
        logger.debug("%s: %s", verb, error)


@contextmanager
def leased(pool: ChunkPool, digests: Sequence[bytes]) -> Iterator[Lease]:
    """Hold a lease for the duration of a block."""
    lease = pool.acquire(digests)
    try:
        yield lease
    finally:
        if lease.id:
            pool.release(lease.id)
