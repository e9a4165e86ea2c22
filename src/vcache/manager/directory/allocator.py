"""All mounted segments: which slot is free, where the next chunk goes. Knows nothing of keys, leases or time."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ...errors import IntegrityError
from ...segment.slots import SegmentInfo, SlabGeometry, SlotLocation, slab_id
from ..api import Placement
from .slabs import FREE, MAX_SLOTS, USED, HostMemory, Owner, Segment, Slab, geometry_of, state_of, tier_of


class Allocator:
    """Keeps the books of all mounted segments. Every call is O(1) in the number of chunks unless it says otherwise."""

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
        self.closed: set[bytes] = set()
        """Attached slabs that are closed, by `slab_id`."""

    @staticmethod
    def slab_key(number: int, index: int) -> int:
        """Name a slab in `slabs`."""
        return number << 16 | index

    def slab_at(self, place: SlotLocation) -> Slab:
        """Return the attached slab that a location lies in."""
        return self.slabs[place.segment << 16 | place.slab]

    # Segments and slabs

    def add_segment(self, info: SegmentInfo) -> Segment:
        """Mount a segment, without slabs yet."""
        self._last_number += 1
        segment = Segment(self._last_number, info, self._join_host(info))
        self.segments[segment.number] = self.by_uuid[info.uuid] = segment
        return segment

    def remove_segment(self, segment: Segment) -> None:
        """Unmount a segment whose slabs are detached."""
        del self.segments[segment.number], self.by_uuid[segment.info.uuid]
        self._leave_host(segment)

    def redefine(self, segment: Segment, info: SegmentInfo) -> None:
        """Describe a segment anew, whose slabs are detached."""
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
        """Change the address at which other hosts read an attached slab."""
        slab.address = address
        self.version += 1

    def attach(self, segment: Segment, slab: Slab) -> None:
        """Make a slab, with all that it holds, a part of a mounted segment."""
        self.version += 1
        slab.segment = segment
        segment.slabs[slab.index] = slab
        self.slabs[self.slab_key(segment.number, slab.index)] = slab
        segment.nbytes += slab.nbytes
        segment.memory.nbytes[segment.tier] += slab.nbytes
        self.refresh(slab)
        self._occupy(slab, slab.busy)

    def blank(self, slab: Slab) -> None:
        """Take all slots from an attached slab whose holders are gone; it gets new ones when it is formatted."""
        segment = slab.segment
        assert segment is not None
        self._occupy(slab, -slab.busy)
        if slab.geometry is not None:
            self._close(segment, slab, slab.geometry.stride)
        slab.geometry, slab.owners, slab.counts = None, [], [0, 0, 0, 0]
        slab.free, slab.listed = array("I"), bytearray()
        self.refresh(slab)

    def detach(self, slab: Slab) -> None:
        """Take a slab out of its segment. Later slabs in the same memory will start above its generations."""
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
        self.closed.discard(slab_id(segment.number, slab.index))

    def await_writer(self, slab: Slab, client: bytes) -> None:
        """Give nobody a slot in this attached slab before `writer_left`."""
        slab.writers.add(client)
        self.refresh(slab)

    def writer_left(self, slab: Slab, client: bytes) -> None:
        """Undo `await_writer`. Idempotent."""
        if client in slab.writers:
            slab.writers.discard(client)
            if not slab.writers:
                self.refresh(slab)

    def raise_floor(self, floor: int) -> None:
        """Start generations of slabs that are attached from now on above `floor`, too."""
        self.floor = max(self.floor, floor + (floor & 1))

    @staticmethod
    def _occupy(slab: Slab, slots: int) -> None:
        """Count so many more slots of an attached slab as not free."""
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
        """List the segments in the order in which a free slot is looked for."""
        skip = frozenset(avoid)

        def rank(segment: Segment) -> tuple[int, float, int]:
            info = segment.info
            tier = 2 if info.kind == "host" else int(placement == "local" and info.device != device)
            return tier, segment.load(), segment.number

        return sorted((segment for number, segment in self.segments.items() if number not in skip), key=rank)

    def find_free(self, segments: Sequence[Segment], stride: int) -> Slab | None:
        """Find a slab with a free slot of this size in the first segment that has room; format an empty slab if need be."""
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
        """Take a free slot, which the caller must give an owner at once (`hold`). There must be one."""
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
        """Free a slot; its slab can hold another slot size after the last one. Also for detached slabs."""
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

    def change(self, slab: Slab, slot: int, before: int) -> None:
        """Count a slot anew whose owner, or its state, is another one now; the state `before`."""
        owner = slab.owners[slot]
        slab.counts[before] -= 1
        slab.counts[state_of(owner)] += 1

    # Reach

    def unreadable(self, host: str, remote: bool) -> frozenset[bytes]:
        """Name the slabs (`slab_id`) that a session on `host` cannot read; none for a session that does not say its host.
        `remote`: it has a transfer engine. O(slabs of other hosts)."""
        if not host:
            return frozenset()
        return frozenset(
            slab_id(segment.number, index)
            for segment in self.segments.values()
            if segment.info.host != host
            for index, slab in segment.slabs.items()
            if not (remote and segment.info.endpoint and slab.address)
        )

    # Gauges

    def totals(self, segment: Segment) -> tuple[list[int], int, int]:
        """Sum up a segment: slots by state, bytes used, slabs without a slot in use. O(slabs)."""
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
