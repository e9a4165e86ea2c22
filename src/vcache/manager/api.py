"""The manager's API in one page: what is asked (`Verb`), what is answered, what the manager says by itself (`Push`).

A verb is a struct. Its fields and the type of its reply decide the bytes on the wire (`wire.py`), `Manager` has a method of one
line that asks it (`client.py`), and `Directory` one handler that answers it (`directory/directory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from ..config import ManagerConfig
from ..keys import DIGEST_BYTES
from ..segment.slots import HEADER_BYTES, SegmentInfo, SlabInfo, SlabInventory, SlotLocation, Tier

R = TypeVar("R")

PROTOCOL_VERSION = 6

WIPE_TIMEOUT = 2.0
"""Seconds that the manager waits for lenders before it answers `remove` and `clear`."""
_CLEAR_TIMEOUT = 60.0
_SECONDS_PER_HEADER = 2e-4
"""What a mount may take for each slot: about twenty times what it takes while nobody else wants anything of the manager."""

Placement = Literal["local", "spread"]
PutStatus = Literal["granted", "exists", "busy", "no_space"]
Role = Literal["engine", "lender", "tool"]

Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
"""A chunk's key."""
Id = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""Of a client, or of a segment."""
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**48)]
"""Bytes of a segment or slab: anything larger is a mistake, not memory."""
Avoid = Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=2**32)]], msgspec.Meta(max_length=2**16)]
"""Numbers of segments."""


# -- records -----------------------------------------------------------------------------------------------------------


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The manager's answer to hello."""

    epoch: int
    """Differs after every manager restart. Numbers (segments, leases) of another epoch mean nothing."""
    heartbeat_interval: float
    """Seconds between heartbeats that keep the session alive."""
    session_timeout: float
    """Seconds of silence after which the manager ends the session."""


class AcquireReply(NamedTuple):
    """The longest present prefix of the keys asked for, pinned by `lease` until `release` or until it expires."""

    lease: int
    """0 when nothing was found: nothing to release."""
    expires_in: float
    """Seconds from the manager's answer."""
    locations: Sequence[SlotLocation]


class PutRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Asks to write consecutive chunks of one prompt, one shard of each."""

    keys: list[bytes]
    """Digests, in prompt order."""
    namespace: bytes
    parent: bytes
    """Digest of the chunk before `keys[0]`; empty when `keys[0]` is the prompt's first chunk."""
    first_index: int
    """Chunk index of `keys[0]` in the prompt."""
    tokens: list[int]
    """Tokens in each chunk."""
    slot_bytes: int
    shard: int = 0
    num_shards: int = 1
    placement: Placement = "local"
    device: str = "host"
    """Device of the writer's KV cache (`SegmentInfo.device` notation): `local` placement prefers segments on it."""
    avoid: list[int] = []
    """Numbers of segments that this client cannot map."""


class PutGrant(msgspec.Struct, frozen=True, array_like=True):
    """Answer for one key of a `PutRequest`. `granted`: write at the location; `location.generation` is the final, even one."""

    status: PutStatus
    location: SlotLocation | None = None
    format_generation: int = 0
    """For the slab header, which the writer writes when it differs from what is there."""
    slots: int = 0
    """Slots in that slab."""
    fence: int = 0
    """The segment's fence word as of its mount: the writer passes the gate with it (`segment/gate.py`), or writes nothing."""


class GateReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a lender found in its segment's write gate when it mounted."""

    fence: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    """The new fence word. 0: the segment has no gate, and no ticket for it will be honoured."""
    writers: tuple[GateWriter, ...] = ()
    """Who may be amid a write of an earlier ticket. The lender reports them again when they are done (`writers_left`); nothing
    else says so, because it undoes what they wrote first."""
    floor: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0
    """Highest epoch that this lender ever heard of: generations start above it, though the wall clock was set back."""


class GateWriter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One process in one slab."""

    client: bytes
    slab: Annotated[int, msgspec.Meta(ge=0, lt=2**16)]


class UndoneSlots(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Slots of a slab, one after the other, whose headers were zeroed because a void ticket's writer had changed them."""

    slab: Annotated[int, msgspec.Meta(ge=0, lt=2**16)]
    first: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
    count: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class Move(msgspec.Struct, frozen=True, array_like=True):
    """One shard that shall move down, or up: copy `source`'s header and payload into the slot of `grant`, then `put_end` its
    ticket (or `put_revoke`). Until then the chunk is where it was."""

    key: bytes
    shard: int
    source: SlotLocation
    grant: PutGrant


class MovePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `demote` and `promote`."""

    lease: int = 0
    """Covers all sources; `release` it when the moves are over. 0: nothing to do."""
    moves: list[Move] = []


class Spill(msgspec.Struct, frozen=True, array_like=True):
    """One shard that shall be written to the storage tier before it may be evicted."""

    key: bytes
    shard: int
    source: SlotLocation


class SpillPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `spill`."""

    lease: int = 0
    """Covers all sources; ended by `spilled`. 0: nothing to do."""
    spills: list[Spill] = []
    """All shards of each chunk, one chunk after the other."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """Names one granted write when it ends."""

    key: bytes
    shard: int
    generation: int


class StatsReply(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the manager started, and gauges now. Bytes are payload capacity."""

    epoch: int
    uptime: float
    counters: dict[str, int]
    gauges: dict[str, int]
    segments: list[SegmentStats]
    sessions: list[SessionStats]


class SegmentStats(msgspec.Struct, frozen=True, kw_only=True):
    info: SegmentInfo
    slots_free: int
    slots_used: int
    slots_processing: int
    slots_quarantined: int
    bytes_used: int
    slabs_unformatted: int


class SessionStats(msgspec.Struct, frozen=True, kw_only=True):
    client: bytes
    name: str
    role: Role
    leases: int
    writes: int
    age: float


class Place(msgspec.Struct, frozen=True):
    """Where one shard is, or was."""

    tier: Tier | None
    """None: the segment has gone since."""
    segment: int
    slab: int
    slot: int
    generation: int


class StoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a chunk, or (the last entries) what there is of it now."""

    ago: float = 0.0
    """Seconds."""
    client: str = ""
    """Name of who asked for it; empty for what the manager did or found by itself."""
    what: str
    detail: str = ""
    shard: int = 0
    place: Place | None = None


# -- verbs -------------------------------------------------------------------------------------------------------------


class Verb(msgspec.Struct, Generic[R], frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """One request; `R` is the type of its reply. Only a client with a session may ask.

    Keys are 16-byte digests. A chunk of which a shard lies in memory of another host is absent for a client that cannot read
    it there (`wire.Hello.host`, `remote`).
    """

    must_arrive: ClassVar[bool] = False
    """Whether the manager must hear of it. When it cannot even be sent, the connection is given up: the next hello settles
    what it would have said."""

    def deadline(self, config: ManagerConfig) -> float:
        """Seconds that a call may take."""
        return config.deadline


class Lookup(Verb[int], frozen=True):
    """Number of leading keys that are complete. Takes no lease; counts as use for eviction."""

    keys: Sequence[bytes]
    payload: bytes | bytearray = b""
    """What the keys came in, if they came in a frame: 16 bytes each, at its end. The log keeps this in place of keys."""


class Acquire(Verb[AcquireReply], frozen=True):
    """Lease the longest present prefix and locate this shard of each. With `lease`: locate only, under that lease (keys it does
    not cover end the prefix, and one that has ended covers none)."""

    keys: Sequence[bytes]
    shard: int = 0
    lease: int = 0
    payload: bytes | bytearray = b""
    """As of `Lookup`."""


class Release(Verb[None], frozen=True):
    """End a lease. Idempotent; unknown leases are ignored. Has no answer. May ask an engine of the host to move chunks up
    (`PromotionWanted`)."""

    lease: int


class Tiers(Verb[list[int]], frozen=True):
    """Per key: 0 complete in VRAM, 1 complete in a lower tier, -1 absent. Does not count as use."""

    keys: list[Digest]


class PutStart(Verb[list[PutGrant]], frozen=True):
    """Tickets for the keys that nobody stored or is storing. May evict. May ask the writer for room (`RoomWanted`).

    A chunk that lies on another host exists, even if this client cannot read it there: one copy is all that the pool keeps.
    """

    request: PutRequest


class PutEnd(Verb[list[bool]], frozen=True):
    """Publish after all bytes landed (rule I2). False: the ticket had lapsed; the chunk stays invisible. Idempotent."""

    must_arrive: ClassVar[bool] = True
    tickets: list[Ticket]


class PutRevoke(Verb[None], frozen=True):
    """Give the slots back unwritten or half written. Idempotent."""

    must_arrive: ClassVar[bool] = True
    tickets: list[Ticket]


class Demote(Verb[MovePlan], frozen=True):
    """Plan moves of the coldest chunks, together at most `nbytes` of payload (at least one), from VRAM to host memory of the
    caller's host, while VRAM there is used above the low watermark. May evict what is not hotter from host memory. A move whose
    chunk somebody else leases meanwhile is refused by `put_end`."""

    nbytes: Size
    avoid: Avoid
    """Segments that the caller cannot map."""


class Promote(Verb[MovePlan], frozen=True):
    """Plan moves of what was leased again in host memory of the caller's host, the latest first, together at most `nbytes` of
    payload (at least one chunk), to VRAM of that host as far as it is free and stays below the low watermark. Evicts nothing.
    A move whose chunk somebody else leases meanwhile is refused by `put_end`."""

    nbytes: Size
    avoid: Avoid
    """Segments that the caller cannot map."""


class PlanSpill(Verb[SpillPlan], frozen=True):
    """Plan writes to storage of the coldest chunks in the lowest tier of the caller's host that are not there yet, together at
    most `nbytes` (at least one chunk), until what is used on that host and not in storage is at the low watermark. Without
    `Spilled`, `Release` ends the plan."""

    nbytes: Size
    avoid: Avoid
    """Segments that the caller cannot map."""


class Spilled(Verb[None], frozen=True):
    """These chunks are in storage with all their shards: not planned again, and first to go when room is needed. The others
    of the plan are left alone for two seconds. Ends the lease of the plan; right also when that has ended, and for keys that
    it does not cover."""

    lease: Annotated[int, msgspec.Meta(ge=0)]
    keys: list[Digest]


class Remove(Verb[int], frozen=True):
    """Forget these chunks unless leased; number removed. Survives a manager restart. Lenders are waited for, for a bounded
    time."""

    keys: list[Digest]

    def deadline(self, config: ManagerConfig) -> float:
        return config.deadline + WIPE_TIMEOUT


class Clear(Verb[int], frozen=True):
    """Forget all chunks (of one namespace); leased ones too, readers then fail verification. Number removed. Writes under way
    are not affected, and what is stored meanwhile may stay. All chunks are looked at, and lenders are waited for; that the
    manager lives is told by heartbeats meanwhile."""

    namespace: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)] = b""

    def deadline(self, config: ManagerConfig) -> float:
        return max(config.deadline, _CLEAR_TIMEOUT) + WIPE_TIMEOUT


class Mount(Verb[int], frozen=True):
    """Lend a segment, or replace what the manager knows of it (idempotent by uuid). Returns the segment's number.

    Every header is read, beside whatever else the manager does; that it lives is told by heartbeats meanwhile. Refused when the
    segment is mounted again, or goes, before the end.
    """

    info: SegmentInfo
    inventory: list[SlabInventory]
    gate: GateReport
    """Was read before `inventory`: until all its writers of a slab have left, nobody is granted a slot there."""

    def deadline(self, config: ManagerConfig) -> float:
        headers = sum(len(slab.slot_headers) for slab in self.inventory) // HEADER_BYTES
        return max(config.deadline, config.connect_timeout) + headers * _SECONDS_PER_HEADER


class WritersLeft(Verb[None], frozen=True):
    """Told by the lender of segment `uuid`: these writers of its `GateReport` have left their slabs, or are dead and the
    quarantine has passed; whatever they wrote since the mount is undone. Idempotent."""

    uuid: Id
    writers: list[GateWriter]
    undone: list[UndoneSlots]
    """In slabs that all of them have left: chunks that the manager believes to be there are gone."""


class Unmount(Verb[None], frozen=True):
    """Stop lending. Its chunks become misses. Idempotent."""

    uuid: Id


class AddSlabs(Verb[None], frozen=True):
    """Grow by new, empty slabs. Idempotent by index; a known slab's address may change. Refused for an index that was given
    back, or has another size."""

    uuid: Id
    slabs: list[SlabInfo]


class DropSlabs(Verb[list[int]], frozen=True):
    """Shrink by at least `nbytes` (or all there is): indices of slabs that hold nothing any more and will get no new chunk. The
    lender then makes importers unmap and frees the memory."""

    uuid: Id
    nbytes: Size


class ImporterGone(Verb[None], frozen=True):
    """Told by the lender of segment `uuid`: that process is dead or has unmapped; its unfinished writes are over."""

    uuid: Id
    client: Id


class RequestResize(Verb[None], frozen=True):
    """Ask the segment's lender for another size. Answered when the lender was told, not when it is done."""

    uuid: Id
    nbytes: Size


class Wiped(Verb[None], frozen=True):
    """A lender finished a `WipeSlots`. Unknown tokens are ignored."""

    token: int


class Segments(Verb[list[SegmentInfo]], frozen=True):
    """What is mounted."""


class Stats(Verb[StatsReply], frozen=True):
    """Counters and gauges."""


class Story(Verb[list[StoryEntry]], frozen=True):
    """What happened to one chunk, as far as the manager's log reaches back, the oldest first, and at last what there is of it
    now. Empty for a key of which nothing is known."""

    key: Digest


# What a transport says by itself.


class InventoryPart(Verb[None], frozen=True):
    """Part of an inventory too large for one frame; used up by the next `Mount` of that segment in this session."""

    uuid: Id
    slabs: list[SlabInventory]


class Heartbeat(Verb[None], frozen=True):
    """A sign of life. So is every other verb."""


class Goodbye(Verb[None], frozen=True):
    """Ends the session as `Hello` starts it: no unfinished writes."""


# -- pushes ------------------------------------------------------------------------------------------------------------


class SegmentMounted(msgspec.Struct, frozen=True, tag=True):
    """Push to every client: a segment is new or changed."""

    info: SegmentInfo


class SegmentGone(msgspec.Struct, frozen=True, tag=True):
    """Push to every client: drop the mapping; locations in it are misses."""

    number: int
    uuid: bytes


class WipeSlots(msgspec.Struct, frozen=True, tag=True):
    """Push to a lender: zero these slot headers, then call `wiped(token)`. Makes `remove` and `clear` survive a restart."""

    token: int
    segment: bytes
    slots: list[tuple[int, int]]
    """(slab index, byte offset of the slot header)."""


class ResizeRequested(msgspec.Struct, frozen=True, tag=True):
    """Push to a lender: somebody asked for this target size (payload bytes of the segment)."""

    segment: bytes
    nbytes: int


class WriterLost(msgspec.Struct, frozen=True, tag=True):
    """Push to a lender: slots of this segment wait for a client that has no session. If that client does not map the segment
    (any more), answer `importer_gone` at once; otherwise when it unmaps or dies, as always."""

    segment: bytes
    client: bytes


class RoomWanted(msgspec.Struct, frozen=True, tag=True):
    """Push to an engine whose `put_start` left memory of its host used above the high watermark: VRAM although there is host
    memory, or the whole pool, not counting what is in storage as well. It calls `demote`, and `spill` if it writes to storage
    on eviction, until they have nothing more to do. Comes again when one of them had nothing to do, or after two seconds."""


class PromotionWanted(msgspec.Struct, frozen=True, tag=True):
    """Push to an engine on a host where chunks in host memory are read again while VRAM has room. It calls `promote` until that
    has nothing more to do. Comes again after two seconds at the earliest."""


Push = SegmentMounted | SegmentGone | WipeSlots | ResizeRequested | WriterLost | RoomWanted | PromotionWanted


class Listener(Protocol):
    """Receives what happens outside a call. Called from the client's own thread; must not block and must not raise."""

    def on_session(self, session: SessionInfo) -> None:
        """A session began (first connection, or a reconnect: compare `epoch`). Lenders mount again here."""

    def on_disconnect(self) -> None:
        """The session is lost; calls fail at once until the next `on_session`."""

    def on_push(self, push: Push) -> None: ...
