"""Segments come, change and go: mount, growth, shrinkage, and lenders that are away for a while."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Generator, Iterable, Sequence

from ...errors import ManagerRefusedError, ProtocolError
from ...keys import DIGEST_BYTES
from ...segment.slots import HEADER_BYTES, LOCATION_BYTES, SegmentInfo, SlabInfo
from ..api import (
    AddSlabs,
    DropSlabs,
    ImporterGone,
    InventoryPart,
    Mount,
    RequestResize,
    ResizeRequested,
    SegmentGone,
    SegmentMounted,
    Unmount,
    Wiped,
    WriterLost,
    WritersLeft,
)
from .inventory import SlabHeaders, check_inventory
from .jobs import Job
from .records import Record
from .recovery import Recovery
from .removal import Removal
from .slabs import PROCESSING, QUARANTINED, UNREAD, USED, Segment, Slab, Wipe, Write
from .state import Session, State
from .writing import Writing

MAX_AWAY = 1024
"""Segments remembered whose lender vanished. No clock decides (decision 0003), but beyond this number the oldest is forgotten.
Should it be mounted after all, its unfinished writes are found as after a restart of the manager: in its gate, and by their odd
headers."""
MAX_NAME = 256
MAX_PARTS = 2**28
"""Bytes of inventory parts that one session may have pending."""


class _Away:
    """What is remembered of a segment that was taken down while its memory may live on."""

    __slots__ = ("event", "owner", "slabs")

    def __init__(self, owner: bytes, slabs: dict[int, Slab], event: int) -> None:
        self.owner = owner
        self.slabs = slabs
        """Slabs with slots that somebody may still write, detached."""
        self.event = event
        """Removals after this one have not reached its memory."""


class Lending:
    """All verbs about segments. Those that name one raise `ManagerRefusedError` when the client does not lend it."""

    def __init__(self, state: State, writing: Writing, removal: Removal) -> None:
        self._state = state
        self._writing = writing
        self._removal = removal
        self._recovery = Recovery(state, writing, removal)
        self._away: OrderedDict[bytes, _Away] = OrderedDict()
        """By uuid, in the order of their going."""
        self._parts: dict[bytes, list[InventoryPart]] = {}
        """By client: what came before its mount."""
        self._part_bytes: Counter[bytes] = Counter()
        """By client: what these hold."""
        self._reading: dict[bytes, Job[int]] = {}
        """Latest mount of each segment, by uuid."""

    def part(self, session: Session, verb: InventoryPart) -> None:
        """Raises `ManagerRefusedError`, and forgets all of them, when a session's parts have too many bytes."""
        client = session.client
        self._parts.setdefault(client, []).append(verb)
        self._part_bytes[client] += sum(HEADER_BYTES + len(slab.slab_header) + len(slab.slot_headers) for slab in verb.slabs)
        if self._part_bytes[client] > MAX_PARTS:
            self._take_parts(client)
            raise ManagerRefusedError(f"mount: an inventory has at most {MAX_PARTS} bytes")

    def _take_parts(self, client: bytes) -> Sequence[InventoryPart]:
        del self._part_bytes[client]
        return self._parts.pop(client, ())

    def mount(self, session: Session, verb: Mount) -> Job[int]:
        """It is mounted at once. The slots are free for use slab by slab, as their headers have been read. Raises
        `ProtocolError` for an impossible segment or inventory; nothing has changed then."""
        state, client, info, gate = self._state, session.client, verb.info, verb.gate
        parts = self._take_parts(client)
        inventory = [*(slab for part in parts if part.uuid == info.uuid for slab in part.slabs), *verb.inventory]
        _check_info(client, info)
        headers = check_inventory(info, inventory)
        segment = state.allocator.by_uuid.get(info.uuid)
        if segment is not None:
            self._owned(client, info.uuid)
            away = self._vacate(segment)
            state.allocator.redefine(segment, info)
            segment.dropped.clear()
        else:
            known = self._away.pop(info.uuid, None)
            away = known if known is not None else _Away(client, {}, 0)
            segment = state.allocator.add_segment(info)
        segment.fence = gate.fence
        state.allocator.raise_floor(gate.floor)
        for slab_info in info.slabs:
            held = away.slabs.get(slab_info.index)
            if held is not None and held.nbytes == slab_info.nbytes and held.busy:
                del away.slabs[slab_info.index]
            else:
                held = None
            self._recovery.attach(segment, slab_info, held, headers.get(slab_info.index))
        for slab in away.slabs.values():
            self._void(slab)
        for writer in gate.writers:
            # Those with a session as well: the lender undoes all that is written there until they have left.
            if writer.slab in segment.slabs:
                state.allocator.await_writer(segment.slabs[writer.slab], writer.client)
        self._announce(segment)
        job = self._reading[info.uuid] = state.jobs.begin(self._read(segment, headers, away.event))
        return job

    def _read(self, segment: Segment, headers: dict[int, SlabHeaders], since: int) -> Generator[None, None, int]:
        number = yield from self._recovery.read(segment, headers, since)
        self._ask_for_writers(segment)
        return number

    def writers_left(self, session: Session, verb: WritersLeft) -> None:
        segment = self._owned(session.client, verb.uuid)
        for undone in verb.undone:
            slab = segment.slabs.get(undone.slab)
            # What is said of a slab that is open already is a repetition: other chunks may be there by now.
            if slab is not None and slab.writers:
                self._overwritten(slab, range(undone.first, min(undone.first + undone.count, slab.slots)))
        for writer in verb.writers:
            slab = segment.slabs.get(writer.slab)
            if slab is not None:
                self._state.allocator.writer_left(slab, writer.client)

    def unmount(self, session: Session, verb: Unmount) -> None:
        client, uuid = session.client, verb.uuid
        if uuid in self._state.allocator.by_uuid:
            self._remove(self._owned(client, uuid))
        if uuid in self._away and self._away[uuid].owner == client:
            self._drop_away(uuid)

    def lender_gone(self, client: bytes, *, goodbye: bool) -> None:
        """Take down the segments of a lender whose session ended. Without goodbye its memory may live on, and it may come back
        with it."""
        self._take_parts(client)
        for segment in list(self._state.allocator.segments.values()):
            if segment.info.owner == client:
                self._remove(segment)
                if goodbye:
                    self._drop_away(segment.info.uuid)

    def add_slabs(self, session: Session, verb: AddSlabs) -> None:
        """Raises `ManagerRefusedError` for an index that was given back or has another size."""
        segment, allocator = self._owned(session.client, verb.uuid), self._state.allocator
        fresh: dict[int, SlabInfo] = {}
        changed: dict[int, SlabInfo] = {}
        for info in verb.slabs:
            _check_slab(info)
            known = segment.slabs.get(info.index)
            size = known.nbytes if known is not None else fresh.setdefault(info.index, info).nbytes
            if info.index in segment.dropped or size != info.nbytes:
                raise ManagerRefusedError(f"add_slabs: slab {info.index} was given back before, or has another size")
            if known is not None and known.address != info.address:
                changed[info.index] = info
        for info in fresh.values():
            allocator.attach(segment, Slab(info.index, info.nbytes, allocator.floor + (allocator.floor & 1), info.address))
        for info in changed.values():
            allocator.readdress(segment.slabs[info.index], info.address)
        if fresh or changed:
            self._announce(segment)

    def drop_slabs(self, session: Session, verb: DropSlabs) -> list[int]:
        """Empty slabs first, then those with the fewest and coldest chunks. O(slots)."""
        segment = self._owned(session.client, verb.uuid)
        chosen: list[Slab] = []
        total = 0
        for slab in sorted(segment.slabs.values(), key=_worth):
            if total >= verb.nbytes:
                break
            chosen.append(slab)
            total += slab.nbytes
        for slab in chosen:
            segment.dropped.add(slab.index)
            self._empty(slab, "its slab was given back")
            self._state.allocator.detach(slab)
            self._void(slab)
        if chosen:
            self._announce(segment)
        return [slab.index for slab in chosen]

    def importer_gone(self, session: Session, verb: ImporterGone) -> None:
        """Ignored when the segment is not mounted."""
        if verb.uuid in self._state.allocator.by_uuid:
            self._writing.importer_gone(self._owned(session.client, verb.uuid), verb.client, self._state.now)

    def request_resize(self, session: Session, verb: RequestResize) -> None:
        """Raises `ManagerRefusedError` for an unknown segment."""
        segment = self._state.allocator.by_uuid.get(verb.uuid)
        if segment is None:
            raise ManagerRefusedError(f"request_resize: no segment {verb.uuid.hex()} is mounted")
        self._state.push(segment.info.owner, ResizeRequested(segment=verb.uuid, nbytes=verb.nbytes))

    def wiped(self, session: Session, verb: Wiped) -> None:
        """Tokens of other lenders are ignored."""
        self._state.wiping.wiped(session.client, verb.token)

    def writer_lost(self, client: bytes) -> None:
        """Ask lenders to tell when the writes of a client are over whose session ended without goodbye."""
        for segment in self._writing.writer_lost(client):
            if segment.info.owner != client:
                self._state.push(segment.info.owner, WriterLost(segment=segment.info.uuid, client=client))

    def away_slabs(self) -> Iterable[Slab]:
        """Go through the detached slabs in which somebody may still write."""
        return (slab for away in self._away.values() for slab in away.slabs.values())

    # Parts

    def _owned(self, client: bytes, uuid: bytes) -> Segment:
        segment = self._state.allocator.by_uuid.get(uuid)
        if segment is None:
            raise ManagerRefusedError(f"no segment {uuid.hex()} is mounted")
        if segment.info.owner != client:
            raise ManagerRefusedError(f"segment {uuid.hex()} is lent by another client")
        return segment

    def _announce(self, segment: Segment) -> None:
        segment.info = segment.describe()
        self._state.push(None, SegmentMounted(info=segment.info))

    def _ask_for_writers(self, segment: Segment) -> None:
        writers = {
            writer
            for writer, writes in self._state.writes.by_writer.items()
            if writer not in self._state.sessions
            and any(write.state == QUARANTINED and write.slab.segment is segment for write in writes.values())
        }
        for writer in sorted(writers):
            self._state.push(segment.info.owner, WriterLost(segment=segment.info.uuid, client=writer))

    def _remove(self, segment: Segment) -> None:
        self._away[segment.info.uuid] = self._vacate(segment)
        if len(self._away) > MAX_AWAY:
            self._drop_away(next(iter(self._away)))
        self._state.allocator.remove_segment(segment)
        if segment.info.host not in self._state.allocator.hosts:
            self._state.chunks.policy.forget_scans(segment.info.host)
        self._state.push(None, SegmentGone(number=segment.number, uuid=segment.info.uuid))

    def _vacate(self, segment: Segment) -> _Away:
        """Take all slabs out of the segment. Its chunks are misses; unfinished writes stay where they are."""
        reading = self._reading.pop(segment.info.uuid, None)
        if reading is not None:
            reading.cancel(ManagerRefusedError("mount: taken back, or repeated, before all headers were read"))
        away = _Away(segment.info.owner, {}, self._removal.done)
        for slab in list(segment.slabs.values()):
            if not self._empty(slab, "its segment went, or was mounted again"):
                away.event = 0
            self._state.allocator.detach(slab)
            if slab.busy:
                away.slabs[slab.index] = slab
        return away

    def _empty(self, slab: Slab, why: str) -> bool:
        """Drop all that a slab holds, except unfinished writes, which lapse. False if removed chunks may be in its memory."""
        state = self._state
        clean = not slab.unread and None not in slab.stale.values() and None not in slab.buried.values()
        slab.stale, slab.buried = {}, {}
        # Where nobody writes the slots need not be freed one by one, which is most of the work.
        quiet = not slab.counts[PROCESSING] and not slab.counts[QUARANTINED]
        hidden: list[bytes] = []
        for slot, owner in enumerate(slab.owners):
            if quiet and isinstance(owner, Record) and len(owner.packed) == LOCATION_BYTES:
                state.counters.evictions += 1
                hidden.append(owner.key)
                state.hide(owner)
            elif owner is UNREAD:
                state.allocator.release(slab, slot)
            elif isinstance(owner, Record):
                if owner.packed:
                    state.evict(owner, why)
            elif isinstance(owner, Write):
                if owner.state == PROCESSING:
                    self._writing.lapse(owner, why)
                elif owner.state == USED:
                    self._writing.release(owner)
            elif isinstance(owner, Wipe):
                clean = False
                state.wiping.end(owner)
        slab.unread = False
        if hidden:
            state.log.happened(state.now, "evicted", hidden, why)
        if quiet:
            state.allocator.blank(slab)
        return clean

    def _overwritten(self, slab: Slab, slots: Iterable[int]) -> None:
        """Drop the complete shards that these slots held when their headers were read."""
        why = "a write from before the mount went over it"
        for slot in slots:
            owner = slab.owners[slot]
            if isinstance(owner, Record):
                self._state.evict(owner, why)
            elif isinstance(owner, Write) and owner.state == USED:
                self._state.log.happened(self._state.now, "dropped", (owner.key,), why, owner.packed)
                self._writing.release(owner)

    def _void(self, slab: Slab) -> None:
        """End the unfinished writes of a detached slab whose memory is gone."""
        for owner in list(slab.owners):
            if isinstance(owner, Write):
                self._writing.release(owner)

    def _drop_away(self, uuid: bytes) -> None:
        away = self._away.pop(uuid, None)
        if away is not None:
            for slab in away.slabs.values():
                self._void(slab)


def _worth(slab: Slab) -> tuple[bool, bool, float, float]:
    """Value what is lost when this slab goes; a sort key."""
    used = [owner.used for owner in slab.owners if isinstance(owner, Record)]
    writing = slab.counts[PROCESSING] + slab.counts[QUARANTINED]
    leased = any(isinstance(owner, Record) and owner.leased for owner in slab.owners)
    return bool(writing), leased, slab.busy / max(1, slab.slots), sum(used) / max(1, len(used))


def _check_slab(slab: SlabInfo) -> None:
    if not 0 <= slab.index < 2**16 or not 0 < slab.nbytes < 2**48 or not 0 <= slab.address < 2**64:
        raise ProtocolError(f"slab {slab.index} of {slab.nbytes} bytes: index, size or address is out of range")


def _check_info(client: bytes, info: SegmentInfo) -> None:
    if len(info.uuid) != DIGEST_BYTES:
        raise ProtocolError(f"mount: a segment's uuid is {DIGEST_BYTES} bytes, got {len(info.uuid)}")
    if info.owner != client:
        raise ManagerRefusedError("mount: the owner of a segment is the client that mounts it")
    for slab in info.slabs:
        _check_slab(slab)
    if max(len(info.endpoint), len(info.host)) > MAX_NAME:
        raise ProtocolError(f"mount: endpoint and host have at most {MAX_NAME} characters each")
    if len({slab.index for slab in info.slabs}) != len(info.slabs):
        raise ProtocolError("mount: a slab index comes twice")
