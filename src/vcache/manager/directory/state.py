"""What the parts of the directory share: tables, counters, the outbox, and how a chunk leaves its slots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ...config import ManagerConfig
from ...errors import ManagerRefusedError
from ...segment.slots import SlotLocation
from ..api import Push, PutGrant, Role
from .admission import Admission
from .allocator import Allocator
from .chunks import ChunkTable
from .counters import Counters
from .eviction import make_policy
from .jobs import SLICE, Jobs
from .leases import LeaseTable
from .log import Log
from .records import Namespace, Record
from .slabs import HostMemory, Slab, Write
from .wiping import Wiping
from .write_table import WriteTable


class Instruction(NamedTuple):
    """Something for the caller of the directory to do."""

    target: bytes | None
    """Client id, or None for every client that has a session."""
    push: Push | None
    """To send. None: the session of `target` was ended by the directory; close its connection."""


class Session:
    """One client's session."""

    __slots__ = ("client", "host", "name", "opened", "remote", "role", "seen", "unreadable", "version")

    def __init__(self, client: bytes, name: str, role: Role, now: float, host: str = "", remote: bool = False) -> None:
        self.client = client
        self.name = name
        self.role: Role = role
        self.host = host
        """Empty: it did not say; it is shown everything, and has nothing to do."""
        self.remote = remote
        """Whether it reads memory of other hosts."""
        self.opened = now
        self.seen = now
        self.unreadable: frozenset[bytes] = frozenset()
        """Slabs that it cannot read; as of `version` of the allocator."""
        self.version = -1


class State:
    """Holds what the parts of the directory share. Not thread-safe; no I/O; time is passed in."""

    def __init__(self, config: ManagerConfig, epoch: int, first_segment: int = 1, slice_size: int = SLICE) -> None:
        """`slice_size`: slots or keys that a job works on between two pauses."""
        self.config = config
        self.epoch = epoch
        self.sessions: dict[bytes, Session] = {}
        self.chunks = ChunkTable(make_policy(config.eviction))
        self.allocator = Allocator(epoch, first_segment)
        self.chunks.policy.closed = self.allocator.closed
        self.admission = Admission(config.admission)
        self.leases = LeaseTable(config.lease_ttl, epoch)
        self.writes = WriteTable()
        self.counters = Counters()
        self.outbox: list[Instruction] = []
        self.jobs = Jobs()
        self.log = Log()
        self.slice_size = slice_size
        self.now = 0.0
        """The time of the latest call."""
        # From the epoch on: a lender's late word on a wipe of an earlier manager is not taken for one of this manager's.
        self.wiping = Wiping(self.allocator, self.counters, self.push, epoch)
        self.clock = 1
        """Coarse time of use: eighths of a second."""
        self._clock_until = 0.0

    def tick_clock(self, now: float) -> int:
        """Tell the coarse time, the same int object for an eighth of a second: it costs the records nothing."""
        if now >= self._clock_until:
            self.clock = max(self.clock, int(now * 8) + 1)
            self._clock_until = self.clock / 8
        return self.clock

    def session(self, client: bytes, now: float) -> Session:
        """Return the client's session, which this proves alive. Raises `ManagerRefusedError` without one."""
        session = self.sessions.get(client)
        if session is None:
            raise ManagerRefusedError("no session: say hello first")
        session.seen = self.now = now
        return session

    def unreadable(self, session: Session) -> frozenset[bytes]:
        """Return the slabs that the session cannot read (`Allocator.unreadable`)."""
        if session.version != self.allocator.version:
            session.version = self.allocator.version
            session.unreadable = self.allocator.unreadable(session.host, session.remote)
        return session.unreadable

    def memory_of(self, session: Session) -> HostMemory | None:
        """Return what is lent on the session's host; None if nothing is, or it does not say its host."""
        return self.allocator.hosts.get(session.host) if session.host else None

    def push(self, target: bytes | None, push: Push) -> None:
        """Instruct to send something to a client, or (None) to all of them."""
        self.outbox.append(Instruction(target, push))

    # Chunks and slots

    def begin_write(
        self,
        slab: Slab,
        client: bytes,
        key: bytes,
        shard: int,
        tokens: int,
        namespace: Namespace | None,
        now: float,
        source: bytes = b"",
    ) -> tuple[Write, PutGrant]:
        """Give a ticket for a free slot of this slab."""
        slot = self.allocator.take(slab)
        generation = slab.next_generation()
        while self.writes.get(client, key, shard, generation) is not None:
            generation = slab.next_generation()
        location = slab.location(slot, tokens, generation)
        write = Write(
            slab, slot, key, shard, generation, namespace=namespace, writer=client, packed=location.pack(), source=source
        )
        self.allocator.hold(slab, slot, write)
        self.writes.add(write)
        self.writes.time(write, now + self.config.ticket_ttl)
        assert slab.segment is not None
        return write, PutGrant("granted", location, slab.format_generation, slab.slots, slab.segment.fence)

    def replace(self, record: Record, shard: int, packed: bytes) -> None:
        """Let another copy take the place of a visible chunk's shard: trace and free the old slot. The caller holds the new
        one."""
        old = SlotLocation.unpack(record.packed_at(shard))
        spilled = record.spilled
        self.mark_spilled(record, False)
        record.relocate(shard, packed)
        self.mark_spilled(record, spilled)
        slab = self.allocator.slab_at(old)
        slab.trace(old.slot, record.key, name_of(record.namespace))
        self.free(slab, old.slot)

    def mark_spilled(self, record: Record, spilled: bool) -> None:
        """Note that a visible chunk is in the storage tier as well, or no longer say so."""
        if record.spilled is spilled:
            return
        record.spilled = spilled
        for place in record.places():
            slab = self.allocator.slab_at(place)
            assert slab.segment is not None
            slab.segment.memory.spilled += slab.share if spilled else -slab.share

    def hide(self, record: Record) -> None:
        """Make a visible chunk absent. The caller frees its slots."""
        self.mark_spilled(record, False)
        self.chunks.hide(record)

    def evict(self, record: Record, why: str) -> None:
        """Make a visible chunk absent and free its slots. Their headers stay until somebody overwrites them."""
        self.counters.evictions += 1
        self.log.happened(self.now, "evicted", (record.key,), why, record.packed)
        places = record.places()
        name = name_of(record.namespace)
        self.hide(record)
        for place in places:
            slab = self.allocator.slab_at(place)
            slab.trace(place.slot, record.key, name)
            self.free(slab, place.slot)

    def free(self, slab: Slab, slot: int) -> None:
        """Free a slot, after its header is zeroed where a removed chunk's may still be there."""
        if slab.segment is not None and slab.stale.get(slot, ()) is None:
            self.wiping.hold([(slab, slot)])
            return
        self.allocator.release(slab, slot)
        if slab.buried and slab.segment is not None and not slab.busy:
            self.wiping.hold_slab(slab, [old for old, traces in slab.buried.items() if traces is None])

    def check_leases(self, client: bytes) -> None:
        """Raises `ManagerRefusedError` when the client holds as many leases as a session may."""
        if not self.leases.has_room(client):
            self.counters.leases_refused += 1
            raise ManagerRefusedError(
                f"this session holds too many leases ({self.leases.count(client)}, or too many chunks in them); release some"
            )

    def unleased(self, records: Iterable[Record]) -> None:
        """Forget the ghosts among these records, of which leases let go."""
        if self.chunks.ghosts:
            for record in records:
                self.chunks.settle(record)


def name_of(namespace: Namespace | None) -> bytes:
    """Name the namespace; empty if it is not known."""
    return namespace.name if namespace is not None else b""
