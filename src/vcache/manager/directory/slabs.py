"""Slabs and their slots: who holds which. And what they are part of: segments, and the memory of a host.

A slot's owner is `None` (free), a `Record` (used), a `Write` (used while other shards are missing, processing or
quarantined), a `Wipe` (quarantined until its header is zeroed) or `UNREAD`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from functools import lru_cache

from ...errors import IntegrityError
from ...segment.slots import SegmentInfo, SlabGeometry, SlabInfo, SlotLocation, slab_geometry
from .heat import Heat
from .records import Namespace, Record

FREE, USED, PROCESSING, QUARANTINED = range(4)
"""States of a slot; also indices into `Slab.counts`."""
VRAM, DRAM = 0, 1
"""Kinds of memory; also indices into the sums of `HostMemory`."""
MAX_SLOTS = 1 << 20
"""A slab that would hold more is not used for that slot size: its tables would cost more than it is worth."""
Traces = tuple[tuple[bytes, bytes], ...] | None
"""What a header may say: (key, namespace or empty if unknown). None: a chunk that was removed meanwhile, so the header must be
zeroed as soon as nobody is in the way."""
MAX_TRACES = 4
geometry_of = lru_cache(maxsize=1024)(slab_geometry)

_DEMOTE, _SPILL = 0, 1
ASK_AGAIN = 2.0
"""Seconds after which an engine is told again that has not said it is done."""
_NEVER = float("-inf")


class Write:
    """One granted write, from the ticket until its slot is published or free again.

    With a `source` it is a move: its chunk is visible all the time, elsewhere, so it is part of no `Pending`.
    """

    __slots__ = (
        "deadline",
        "generation",
        "key",
        "lease",
        "namespace",
        "packed",
        "shard",
        "slab",
        "slot",
        "source",
        "state",
        "ticket",
        "writer",
    )

    def __init__(
        self,
        slab: Slab,
        slot: int,
        key: bytes,
        shard: int,
        generation: int,
        *,
        namespace: Namespace | None = None,
        writer: bytes = b"",
        packed: bytes = b"",
        source: bytes = b"",
    ) -> None:
        self.slab = slab
        self.slot = slot
        self.key = key
        self.shard = shard
        self.generation = generation
        """The final, even one."""
        self.namespace = namespace
        """None: unknown, because the header does not say it while it is written."""
        self.writer = writer
        """Client id; empty for a shard that was found complete in an inventory."""
        self.packed = packed
        self.source = source
        """Packed location from which a move copies; empty for every other write."""
        self.lease = 0
        """Of a move: number of the lease that its plan took."""
        self.state = PROCESSING
        self.deadline = 0.0
        """Processing: when the ticket lapses. Used: when the chunk must be complete. Quarantined: when the slot is free, or 0
        while that depends on what we hear of the writer."""
        self.ticket: tuple[bytes, int, int] = (key, shard, generation)
        """Its name among the writer's writes."""


class Wipe:
    """Holds a slot whose header must be zeroed before anything else may be written there."""

    __slots__ = ("slab", "slot", "token")

    def __init__(self, slab: Slab, slot: int, token: int) -> None:
        self.slab = slab
        self.slot = slot
        self.token = token


class Unread:
    """Holds the slots of a mounted slab whose headers have not been read yet."""

    __slots__ = ()


UNREAD = Unread()
Owner = Record | Write | Wipe | Unread


def state_of(owner: Owner | None) -> int:
    """Return the state of the slot that `owner` holds."""
    if owner is None:
        return FREE
    if isinstance(owner, Record):
        return USED
    return owner.state if isinstance(owner, Write) else QUARANTINED


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
        """Clients that may be amid a write of a ticket from before the mount: until the lender says that they have left, and
        that what they wrote is undone, no slot of the slab is given to anybody (rule I3)."""

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
        """Give out a generation (rule I4)."""
        self.counter += 2
        return self.counter

    def trace(self, slot: int, key: bytes, namespace: bytes) -> None:
        """Remember what the header of a slot that is given up may say."""
        known = self.stale.get(slot, ())
        if known is not None and (key, namespace) not in known:
            self.stale[slot] = (*known, (key, namespace)) if len(known) < MAX_TRACES else None

    def confirm(self, slot: int) -> None:
        """Forget what headers said before a write that is complete: the slab's is the current one, the slot's the writer's."""
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
        """Address a slot of an attached slab."""
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


class HostMemory:
    """What is lent on one host. A slot counts as its share of its slab, so that a slab without a free slot is used to 100%
    whatever its geometry wastes."""

    __slots__ = ("busy", "heat", "nbytes", "quiet_until", "segments", "spilled")

    def __init__(self) -> None:
        self.segments = 0
        self.nbytes = [0, 0]
        """Bytes of slabs, VRAM and DRAM."""
        self.busy = [0, 0]
        """Bytes of slots that are not free, VRAM and DRAM."""
        self.spilled = 0
        """Bytes of slots whose chunk is in the storage tier as well: room that costs nothing to make."""
        self.quiet_until = [_NEVER, _NEVER]
        """Before this time nobody is told to demote, or to spill."""
        self.heat = Heat()

    def wants_room(self, high: float, now: float) -> bool:
        """Whether to tell an engine of this host now: VRAM is used above `high` although there is host memory, or the whole
        pool is, without what could go at once. At most one wish of each kind is outstanding. O(1)."""
        demote = self.nbytes[DRAM] > 0 and self.busy[VRAM] > high * self.nbytes[VRAM]
        spill = self.unspilled() > high * sum(self.nbytes)
        wanted = False
        for kind, over in ((_DEMOTE, demote), (_SPILL, spill)):
            if over and now >= self.quiet_until[kind]:
                self.quiet_until[kind] = now + ASK_AGAIN
                wanted = True
        return wanted

    def unspilled(self) -> int:
        """Count the bytes in use that would be lost with their slots."""
        return sum(self.busy) - self.spilled

    def demoted(self) -> None:
        """End the wish: there is nothing more to demote."""
        self.quiet_until[_DEMOTE] = _NEVER

    def spilled_all(self) -> None:
        """End the wish: there is nothing more to spill."""
        self.quiet_until[_SPILL] = _NEVER


def tier_of(info: SegmentInfo) -> int:
    """Tell the kind of memory: `VRAM` or `DRAM`."""
    return VRAM if info.kind == "cuda" else DRAM


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
        """Return what every client is told."""
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
        """Return the part of its bytes that is in use."""
        return self.busy / self.nbytes if self.nbytes else 1.0
