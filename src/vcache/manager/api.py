"""What goes between the manager and its clients: typed records, and the interface that both the remote client and the
embedded manager offer. The bytes on the wire are `protocol.py`'s affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec

from ..segment.slots import SegmentInfo, SlabInfo, SlabInventory, SlotLocation

PROTOCOL_VERSION = 3

Placement = Literal["local", "spread"]
PutStatus = Literal["granted", "exists", "busy", "no_space"]
Role = Literal["engine", "lender", "tool"]


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
    locations: list[SlotLocation]


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
    """Who may be amid a write of an earlier ticket. The lender reports them again when they are done (`writers_left`)."""
    floor: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0
    """Highest epoch that this lender ever heard of: generations start above it, though the wall clock was set back."""


class GateWriter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One process in one slab."""

    client: bytes
    slab: Annotated[int, msgspec.Meta(ge=0, lt=2**16)]


class Move(msgspec.Struct, frozen=True, array_like=True):
    """One shard that shall move down: copy `source`'s header and payload into the slot of `grant`, then `put_end` its ticket
    (or `put_revoke`). Until then the chunk is where it was."""

    key: bytes
    shard: int
    source: SlotLocation
    grant: PutGrant


class MovePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of `demote`."""

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


Push = SegmentMounted | SegmentGone | WipeSlots | ResizeRequested | WriterLost | RoomWanted


class Listener(Protocol):
    """Receives what happens outside a call. Called from the client's own thread; must not block and must not raise."""

    def on_session(self, session: SessionInfo) -> None:
        """A session began (first connection, or a reconnect: compare `epoch`). Lenders mount again here."""

    def on_disconnect(self) -> None:
        """The session is lost; calls fail at once until the next `on_session`."""

    def on_push(self, push: Push) -> None: ...


class Manager(Protocol):
    """The manager as its clients see it. Implemented by `client.ManagerClient` (remote) and `embedded.EmbeddedManager`.

    Thread-safe. Every call blocks at most for its deadline, then raises `DeadlineExceededError`; without a connection it
    raises `ManagerUnavailableError` at once. Keys are 16-byte digests. A chunk of which a shard lies in memory of another host
    is absent for a client that cannot read it there (`protocol.Hello.host`, `remote`).
    """

    @property
    def client_id(self) -> bytes:
        """16 random bytes that name this client for its life, over reconnects and manager restarts."""

    @property
    def epoch(self) -> int:
        """Epoch of the current session; 0 without one."""

    def lookup(self, keys: Sequence[bytes]) -> int:
        """Number of leading keys that are complete. Takes no lease; counts as use for eviction."""

    def acquire(self, keys: Sequence[bytes], shard: int = 0, *, lease: int = 0) -> AcquireReply:
        """Lease the longest present prefix and locate this shard of each. With `lease`: locate only, under that lease
        (keys it does not cover end the prefix)."""

    def release(self, lease: int) -> None:
        """End a lease. Idempotent; unknown leases are ignored. Does not wait for an answer."""

    def put_start(self, request: PutRequest) -> list[PutGrant]:
        """Tickets for the keys that nobody stored or is storing. May evict. A chunk that lies on another host exists, even if
        this client cannot read it there."""

    def put_end(self, tickets: Sequence[Ticket]) -> list[bool]:
        """Publish after all bytes landed (rule I2). False: the ticket had lapsed; the chunk stays invisible."""

    def put_revoke(self, tickets: Sequence[Ticket]) -> None:
        """Give the slots back unwritten or half written. Idempotent."""

    def demote(self, nbytes: int, avoid: Sequence[int] = ()) -> MovePlan:
        """Plan moves of the coldest chunks, together at most `nbytes` of payload (at least one), from VRAM to host memory of
        the caller's host, while VRAM there is used above the low watermark. `avoid`: numbers of segments that the caller
        cannot map. A move whose chunk somebody else leases meanwhile is refused by `put_end`."""

    def spill(self, nbytes: int, avoid: Sequence[int] = ()) -> SpillPlan:
        """Plan writes to storage of the coldest chunks in the lowest tier of the caller's host that are not there yet, together
        at most `nbytes` (at least one chunk), until what is used on that host and not in storage is at the low watermark.
        Without `spilled`, `release` ends the plan."""

    def spilled(self, lease: int, keys: Sequence[bytes]) -> None:
        """These chunks are in storage with all their shards: not planned again, and first to go when room is needed. The
        others of the plan are left alone for two seconds. Ends the lease of the plan; right also when that has ended."""

    def tiers(self, keys: Sequence[bytes]) -> list[int]:
        """Per key: 0 complete in VRAM, 1 complete in a lower tier, -1 absent. Does not count as use."""

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget these chunks unless leased; number removed. Survives a manager restart."""

    def clear(self, namespace: bytes = b"") -> int:
        """Forget all chunks (of one namespace); leased ones too, readers then fail verification. Number removed."""

    def mount(self, info: SegmentInfo, inventory: Sequence[SlabInventory] = (), gate: GateReport | None = None) -> int:
        """Lend a segment, or replace what the manager knows of it (idempotent by uuid). `gate` was read before `inventory`:
        while its writers are amid a write, nobody is granted a slot in their slabs. Returns the segment's number."""

    def writers_left(self, uuid: bytes, writers: Sequence[GateWriter]) -> None:
        """Told by the lender of segment `uuid`: these writers of its `GateReport` have left their slabs, or are dead and the
        quarantine has passed. Idempotent."""

    def unmount(self, uuid: bytes) -> None:
        """Stop lending. Its chunks become misses. Idempotent."""

    def add_slabs(self, uuid: bytes, slabs: Sequence[SlabInfo]) -> None:
        """Grow by new, empty slabs. Idempotent by index."""

    def drop_slabs(self, uuid: bytes, nbytes: int) -> list[int]:
        """Shrink by at least `nbytes` (or all there is): indices of slabs that hold nothing any more and will get no new
        chunk. The lender then makes importers unmap and frees the memory."""

    def importer_gone(self, uuid: bytes, client: bytes) -> None:
        """Told by the lender of segment `uuid`: that process is dead or has unmapped; its unfinished writes are over."""

    def request_resize(self, uuid: bytes, nbytes: int) -> None:
        """Ask the segment's lender for another size. Returns when the lender was told, not when it is done."""

    def wiped(self, token: int) -> None:
        """A lender finished a `WipeSlots`."""

    def segments(self) -> list[SegmentInfo]: ...

    def stats(self) -> StatsReply: ...

    def subscribe(self, listener: Listener) -> None:
        """Add a listener; if a session exists, `on_session` and the mounted segments are delivered to it at once."""

    def set_write_gate(self, wait_idle: Callable[[float], bool]) -> None:
        """Tell the client how to learn that its process has no unfinished write, which every hello after the first promises.

        `wait_idle(timeout)` blocks for at most `timeout` seconds and returns whether no write is in flight; it is called from
        the client's own thread while there is no session. A write is in flight from **before** its `put_start` until its
        `put_end` or `put_revoke` returned or raised. A process that writes sets the gate before its first `put_start`.
        """

    def close(self) -> None:
        """Say goodbye and stop. Idempotent. Blocks at most for one deadline."""
