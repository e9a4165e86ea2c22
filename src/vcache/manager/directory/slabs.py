"""Segments, slabs and slots: who holds which slot, where the next chunk goes. Knows nothing of keys, leases or time."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ...errors import IntegrityError
from ...segment.slots import SegmentInfo, SlabGeometry, SlabInfo, SlotLocation, slab_geometry
from ..api import Placement
from .hosts import HostMemory, tier_of
from .records import FREE, QUARANTINED, UNREAD, USED, Owner, Record, Unread, Wipe, state_of

MAX_SLOTS = 1 << 20
"""A slab that would hold more is not used for that slot size: its tables would cost more than it is worth."""
Traces = tuple[tuple[bytes, bytes], ...] | None
"""What a header may say: (key, namespace or empty if unknown). None: a chunk that was removed meanwhile, so the header must be
zeroed as soon as nobody is in the way."""
MAX_TRACES = 4
geometry_of = lru_cache(maxsize=1024)(slab_geometry)


class Slab:
    """One slab and its slots. Attached to a segment, or detached while its lender is away and somebody may still write."""

    __slots__ = (
        "address",
        "buried",
        "counter",
        "counts",
        "format_generation",
        "free",
        "geometry",
        "index",
        "listed",
        "nbytes",
        "owners",
        "segment",
        "share",
        "stale",
        "unread",
        "writers",
    )

    def __init__(self, index: int, nbytes: int, counter: int, address: int = 0) -> None:
        self.index = index
        self.nbytes = nbytes
        self.address = address
        """Where the lender's transfer engine has it registered; 0: nowhere."""
        self.share = 0
        """Bytes of the slab for each slot, its part of what the geometry wastes included."""
        self.segment: Segment | None = None
        self.counter = counter
        """Highest generation given out in this slab (rule I4); even."""
        self.format_generation = 0
        self.geometry: SlabGeometry | None = None
        """None until first formatted. An empty slab keeps it until it is formatted for another slot size."""
        self.owners: list[Owner | None] = []
        self.free = array("I")
        """Free slots, the next one last; and some that were free, because what lies in the middle is not looked for."""
        self.listed = bytearray()
        """For each slot 1 if it is in `free`, where none is twice."""
        self.unread = False
        """Its headers are being read: until that is done, no slot is given to anybody."""
        self.counts = [0, 0, 0, 0]
        """Slots by state (rule I5)."""
        self.stale: dict[int, Traces] = {}
        """Slots whose memory may still carry headers of chunks that the directory no longer has there."""
        self.buried: dict[int, Traces] = {}
        """The same from before the slab was formatted anew; they count only until somebody wrote the new slab header."""
        self.writers: set[bytes] = set()
        """Clients that may be amid a write of a ticket that an earlier manager gave: until they have left, no slot of the slab
        is given to anybody (rule I3)."""

    @property
    def slots(self) -> int:
        return len(self.owners)

    @property
    def closed(self) -> bool:
        """Whether no slot is given to anybody now."""
        return self.unread or bool(self.writers)

    @property
    def busy(self) -> int:
        """Slots that are not free."""
        return len(self.owners) - self.counts[FREE]

    def next_generation(self) -> int:
        self.counter += 2
        return self.counter

    def trace(self, slot: int, key: bytes, namespace: bytes) -> None:
        """The slot is given up, and its header may say this."""
        known = self.stale.get(slot, ())
        if known is not None and (key, namespace) not in known:
            self.stale[slot] = (*known, (key, namespace)) if len(known) < MAX_TRACES else None

    def confirm(self, slot: int) -> None:
        """A write in this slot is complete: the slab header is the current one, and the slot's the writer's."""
        self.stale.pop(slot, None)
        self.buried.clear()

    def is_doomed(self) -> bool:
        """Whether headers of removed chunks may be in its memory, to be zeroed now or later. O(slots)."""
        if None in self.stale.values() or None in self.buried.values():
            return True
        return any(isinstance(owner, Wipe) for owner in self.owners)

    def layout(self, geometry: SlabGeometry, format_generation: int, *, unread: bool = False) -> None:
        """Forget all slots and start with free ones of this geometry; `unread`: with none, as after `unread_all`."""
        self.geometry = geometry
        self.share = self.nbytes // geometry.slots if geometry.slots else 0
        self.format_generation = format_generation
        self.unread = unread
        if unread:
            self.owners, self.counts = [UNREAD] * geometry.slots, [0, 0, 0, geometry.slots]
            self.free, self.listed = array("I"), bytearray(geometry.slots)
        else:
            self.owners, self.counts = [None] * geometry.slots, [geometry.slots, 0, 0, 0]
            self.free, self.listed = array("I", range(geometry.slots - 1, -1, -1)), bytearray(b"\1") * geometry.slots

    def unread_all(self) -> None:
        """Give out nothing until every slot without a holder was released again (see `UNREAD`). O(slots), but fast."""
        self.unread = True
        self.owners = [UNREAD if owner is None else owner for owner in self.owners]
        self.counts[QUARANTINED] += self.counts[FREE]
        self.counts[FREE] = 0
        self.free, self.listed = array("I"), bytearray(len(self.owners))

    def location(self, slot: int, tokens: int, generation: int) -> SlotLocation:
        assert self.segment is not None
        assert self.geometry is not None
        return SlotLocation(self.segment.number, self.index, tokens, slot, self.geometry.stride, generation)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` naming the rule."""
        where = f"slab {self.index}"
        counts = [0, 0, 0, 0]
        for slot, owner in enumerate(self.owners):
            counts[state_of(owner)] += 1
            if isinstance(owner, Unread):
                if not self.unread:
                    raise IntegrityError(f"I5: {where}: slot {slot} was never read")
            elif owner is not None and not isinstance(owner, Record) and (owner.slab is not self or owner.slot != slot):
                raise IntegrityError(f"I5: {where}: slot {slot} is held by one who believes to hold another slot")
        if counts != self.counts or sum(counts) != (self.geometry.slots if self.geometry else 0):
            raise IntegrityError(f"I5: {where}: states counted {counts}, recorded {self.counts}, capacity {self.slots}")
        listed = [slot for slot, flag in enumerate(self.listed) if flag]
        if sorted(self.free) != listed or any(
            owner is None and not self.listed[slot] for slot, owner in enumerate(self.owners)
        ):
            raise IntegrityError(f"I5: {where}: free list and owners differ")
        if self.geometry is not None and (self.counter < self.format_generation or self.counter & 1):
            raise IntegrityError(f"I4: {where}: counter {self.counter} below format generation {self.format_generation} or odd")


def slab_id(segment: int, slab: int) -> bytes:
    """`SlotLocation.slab_id` of what lies there."""
    return segment.to_bytes(4, "little") + slab.to_bytes(2, "little")


class Segment:
    """A mounted segment."""

    def __init__(self, number: int, info: SegmentInfo, memory: HostMemory) -> None:
        self.number = number
        self.info = info
        self.memory = memory
        """Sums of its host, to which it adds as `tier`."""
        self.tier = tier_of(info)
        self.slabs: dict[int, Slab] = {}
        self.dropped: set[int] = set()
        """Indices that were given back and never return while mounted."""
        self.open: dict[int, OrderedDict[int, Slab]] = {}
        """Slot size -> slabs of that size with a free slot. Empty ones last."""
        self.empty: OrderedDict[int, Slab] = OrderedDict()
        """Slabs without a slot in use, formatted or not."""
        self.nbytes = 0
        self.busy = 0
        """Payload bytes of slots that are not free."""
        self.fence = 0
        """Of its write gate, as of its last mount; goes with every ticket."""

    def describe(self) -> SegmentInfo:
        """What every client is told."""
        slabs = tuple(SlabInfo(slab.index, slab.nbytes, slab.address) for slab in self.slabs.values())
        old = self.info
        return SegmentInfo(
            uuid=old.uuid,
            kind=old.kind,
            host=old.host,
            device=old.device,
            broker=old.broker,
            owner=old.owner,
            slabs=slabs,
            number=self.number,
            endpoint=old.endpoint,
        )

    def load(self) -> float:
        return self.busy / self.nbytes if self.nbytes else 1.0


class Allocator:
    """All mounted segments. Pure bookkeeping; every call is O(1) in the number of chunks unless it says otherwise."""

    def __init__(self, floor: int, first_segment: int = 1) -> None:
        """`floor`: generations of new slabs start above it (the manager's epoch). `first_segment`: number of the first one."""
        self.segments: dict[int, Segment] = {}
        """By number."""
        self.by_uuid: dict[bytes, Segment] = {}
        self.slabs: dict[int, Slab] = {}
        """Attached slabs, by `slab_key`."""
        self.hosts: dict[str, HostMemory] = {}
        """Hosts on which segments are mounted."""
        self.version = 0
        """Grows whenever slabs come or go, or can be read by others than before."""
        self.floor = floor
        self._last_number = first_segment - 1
        self.awaiting: dict[Slab, None] = {}
        """Attached slabs that wait for writers."""
        self.closed: set[bytes] = set()
        """Attached slabs that are closed, by `slab_id`."""

    @staticmethod
    def slab_key(number: int, index: int) -> int:
        return number << 16 | index

    def slab_at(self, place: SlotLocation) -> Slab:
        return self.slabs[place.segment << 16 | place.slab]

    # Segments and slabs

    def add_segment(self, info: SegmentInfo) -> Segment:
        """A new segment without slabs."""
        self._last_number += 1
        segment = Segment(self._last_number, info, self._join_host(info))
        self.segments[segment.number] = self.by_uuid[info.uuid] = segment
        return segment

    def remove_segment(self, segment: Segment) -> None:
        """The caller has detached its slabs."""
        del self.segments[segment.number], self.by_uuid[segment.info.uuid]
        self._leave_host(segment)

    def redefine(self, segment: Segment, info: SegmentInfo) -> None:
        """The segment's lender describes it anew. The caller has detached its slabs."""
        self._leave_host(segment)
        segment.info, segment.memory, segment.tier = info, self._join_host(info), tier_of(info)

    def _join_host(self, info: SegmentInfo) -> HostMemory:
        memory = self.hosts.get(info.host)
        if memory is None:
            memory = self.hosts[info.host] = HostMemory()
        memory.segments += 1
        return memory

    def _leave_host(self, segment: Segment) -> None:
        segment.memory.segments -= 1
        if not segment.memory.segments:
            del self.hosts[segment.info.host]

    def readdress(self, slab: Slab, address: int) -> None:
        """Others read an attached slab there now."""
        slab.address = address
        self.version += 1

    def attach(self, segment: Segment, slab: Slab) -> None:
        self.version += 1
        slab.segment = segment
        segment.slabs[slab.index] = slab
        self.slabs[self.slab_key(segment.number, slab.index)] = slab
        segment.nbytes += slab.nbytes
        segment.memory.nbytes[segment.tier] += slab.nbytes
        self.refresh(slab)
        self._occupy(slab, slab.busy)

    def blank(self, slab: Slab) -> None:
        """All holders of an attached slab are gone: it has no slots until it is formatted."""
        segment = slab.segment
        assert segment is not None
        self._occupy(slab, -slab.busy)
        if slab.geometry is not None:
            self._close(segment, slab, slab.geometry.stride)
        slab.geometry, slab.owners, slab.counts = None, [], [0, 0, 0, 0]
        slab.free, slab.listed = array("I"), bytearray()
        self.refresh(slab)

    def detach(self, slab: Slab) -> None:
        """Later slabs in the same memory will start above its generations."""
        segment = slab.segment
        assert segment is not None
        self.version += 1
        self.floor = max(self.floor, slab.counter)
        del segment.slabs[slab.index], self.slabs[self.slab_key(segment.number, slab.index)]
        segment.nbytes -= slab.nbytes
        segment.memory.nbytes[segment.tier] -= slab.nbytes
        segment.empty.pop(slab.index, None)
        if slab.geometry is not None:
            self._close(segment, slab, slab.geometry.stride)
        self._occupy(slab, -slab.busy)
        slab.segment = None
        # The next mount of this memory says who is in it then.
        slab.writers.clear()
        self.awaiting.pop(slab, None)
        self.closed.discard(slab_id(segment.number, slab.index))

    def await_writer(self, slab: Slab, client: bytes) -> None:
        """Give nobody a slot in this attached slab before `writer_left`."""
        slab.writers.add(client)
        self.awaiting[slab] = None
        self.refresh(slab)

    def writer_left(self, slab: Slab, client: bytes) -> None:
        """Undo `await_writer`. Idempotent."""
        if client in slab.writers:
            slab.writers.discard(client)
            if not slab.writers:
                self.awaiting.pop(slab, None)
                self.refresh(slab)

    def awaited(self, client: bytes) -> list[Slab]:
        """Slabs that wait for this client."""
        return [slab for slab in self.awaiting if client in slab.writers]

    def raise_floor(self, floor: int) -> None:
        """Generations of slabs that are attached from now on start above `floor`, too."""
        self.floor = max(self.floor, floor + (floor & 1))

    @staticmethod
    def _occupy(slab: Slab, slots: int) -> None:
        """So many more slots of an attached slab are not free."""
        segment, geometry = slab.segment, slab.geometry
        if geometry is not None and segment is not None:
            segment.busy += slots * geometry.stride
            segment.memory.busy[segment.tier] += slots * slab.share

    def refresh(self, slab: Slab) -> None:
        """Sort an attached slab among the open, the empty and the closed ones, after `layout` or when it closed or opened."""
        segment = slab.segment
        assert segment is not None
        if slab.closed:
            self.closed.add(slab_id(segment.number, slab.index))
        elif self.closed:
            self.closed.discard(slab_id(segment.number, slab.index))
        if slab.geometry is not None:
            self._close(segment, slab, slab.geometry.stride)
            if slab.counts[FREE] and not slab.closed:
                segment.open.setdefault(slab.geometry.stride, OrderedDict())[slab.index] = slab
        if slab.busy or slab.closed:
            segment.empty.pop(slab.index, None)
        else:
            segment.empty[slab.index] = slab

    @staticmethod
    def _close(segment: Segment, slab: Slab, stride: int) -> None:
        group = segment.open.get(stride)
        if group is not None:
            group.pop(slab.index, None)
            if not group:
                del segment.open[stride]

    # Placement

    def candidates(self, placement: Placement, device: str, avoid: Iterable[int]) -> list[Segment]:
        """Segments in the order in which a free slot is looked for."""
        skip = frozenset(avoid)

        def rank(segment: Segment) -> tuple[int, float, int]:
            info = segment.info
            tier = 2 if info.kind == "host" else int(placement == "local" and info.device != device)
            return tier, segment.load(), segment.number

        return sorted((segment for number, segment in self.segments.items() if number not in skip), key=rank)

    def find_free(self, segments: Sequence[Segment], stride: int) -> Slab | None:
        """A slab with a free slot of this size in the first segment that has room; formats an empty slab if need be."""
        for segment in segments:
            group = segment.open.get(stride)
            if group:
                return next(iter(group.values()))
            for slab in segment.empty.values():
                geometry = geometry_of(slab.nbytes, stride)
                if 0 < geometry.slots <= MAX_SLOTS:
                    self._format(slab, geometry)
                    return slab
        return None

    def _format(self, slab: Slab, geometry: SlabGeometry) -> None:
        segment = slab.segment
        assert segment is not None
        assert not slab.busy
        if slab.geometry is not None:
            self._close(segment, slab, slab.geometry.stride)
        for slot, traces in slab.stale.items():
            before = slab.buried.get(slot, ())
            slab.buried[slot] = None if traces is None or before is None else traces + before
        slab.stale = {}
        slab.layout(geometry, slab.next_generation())
        self.refresh(slab)

    def take(self, slab: Slab) -> int:
        """A free slot, which the caller must give an owner at once (`hold`). There must be one."""
        while True:
            slot = slab.free.pop()
            slab.listed[slot] = 0
            if slab.owners[slot] is None:
                return slot

    def hold(self, slab: Slab, slot: int, owner: Owner) -> None:
        """Make `owner` the holder of a free slot."""
        segment, geometry = slab.segment, slab.geometry
        assert segment is not None
        assert geometry is not None
        if not slab.busy:
            segment.empty.pop(slab.index, None)
        slab.owners[slot] = owner
        slab.counts[FREE] -= 1
        slab.counts[state_of(owner)] += 1
        self._occupy(slab, 1)
        if not slab.counts[FREE]:
            self._close(segment, slab, geometry.stride)

    def release(self, slab: Slab, slot: int) -> None:
        """The slot is free again, and its slab unformatted with the last one. Also for detached slabs."""
        owner = slab.owners[slot]
        assert owner is not None
        slab.counts[state_of(owner)] -= 1
        slab.counts[FREE] += 1
        slab.owners[slot] = None
        if not slab.listed[slot]:
            slab.listed[slot] = 1
            slab.free.append(slot)
        segment, geometry = slab.segment, slab.geometry
        if segment is None or geometry is None:
            return
        self._occupy(slab, -1)
        if not slab.busy or slab.counts[FREE] == 1:
            self.refresh(slab)

    # Gauges

    def totals(self, segment: Segment) -> tuple[list[int], int, int]:
        """Slots by state, bytes used, slabs without a slot in use. O(slabs)."""
        counts, used = [0, 0, 0, 0], 0
        for slab in segment.slabs.values():
            if slab.busy and slab.geometry is not None:
                counts = [a + b for a, b in zip(counts, slab.counts, strict=True)]
                used += slab.counts[USED] * slab.geometry.stride
        return counts, used, len(segment.empty)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` naming the rule. O(slots)."""
        closed = {slab_id(slab.segment.number, slab.index) for slab in self.slabs.values() if slab.closed and slab.segment}
        if closed != self.closed:
            raise IntegrityError("I5: slabs that give out nothing are counted wrongly")
        if sum(len(segment.slabs) for segment in self.segments.values()) != len(self.slabs):
            raise IntegrityError("I5: slabs of segments and slabs in the table differ")
        sums = {host: ([0, 0], [0, 0]) for host in self.hosts}
        for segment in self.segments.values():
            nbytes = busy = 0
            if segment.memory is not self.hosts.get(segment.info.host) or segment.tier != tier_of(segment.info):
                raise IntegrityError(f"I5: segment {segment.number} is counted for another host or kind of memory")
            for index, slab in segment.slabs.items():
                slab.check_integrity()
                where = f"I5: segment {segment.number}, slab {index}"
                if slab.segment is not segment or self.slabs.get(self.slab_key(segment.number, index)) is not slab:
                    raise IntegrityError(f"{where}: not where it believes to be")
                nbytes += slab.nbytes
                if (index in segment.empty) != (slab.busy == 0 and not slab.closed):
                    raise IntegrityError(f"{where}: {slab.busy} busy slots, among the empty: {index in segment.empty}")
                listed = [stride for stride, group in segment.open.items() if index in group]
                grants = slab.geometry is not None and slab.counts[FREE] and not slab.closed
                expected = [slab.geometry.stride] if slab.geometry is not None and grants else []
                if listed != expected:
                    raise IntegrityError(f"{where}: open for slot sizes {listed}, expected {expected}")
                busy += slab.busy * (slab.geometry.stride if slab.geometry else 0)
                sums[segment.info.host][0][segment.tier] += slab.nbytes
                sums[segment.info.host][1][segment.tier] += slab.busy * slab.share
            if (nbytes, busy) != (segment.nbytes, segment.busy):
                raise IntegrityError(
                    f"I5: segment {segment.number}: bytes {nbytes}/{busy}, recorded {segment.nbytes}/{segment.busy}"
                )

        for host, memory in self.hosts.items():
            if (memory.nbytes, memory.busy) != sums[host]:
                raise IntegrityError(f"I5: host {host}: bytes {sums[host]}, recorded {memory.nbytes}, {memory.busy}")

    def change(self, slab: Slab, slot: int, before: int) -> None:
        """The state of the slot's owner was `before` and is now another one."""
        owner = slab.owners[slot]
        slab.counts[before] -= 1
        slab.counts[state_of(owner)] += 1
