"""The manager's heart: a pure state machine. Events in, replies and instructions out; no sockets, threads or clocks.

Who calls it serialises the calls, passes the time (seconds, any origin, never backwards) and the client id of the session,
carries out `take_instructions()` after every call, and calls `tick` no later than `next_deadline()`. What
`begin_...` begins goes on bit by bit, by `work`; without `begin_` all of it is done at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from ...config import ManagerConfig
from ...errors import ProtocolError
from ...keys import DIGEST_BYTES
from ...segment.slots import SegmentInfo, SlabInfo, SlabInventory
from ..api import (
    AcquireReply,
    GateReport,
    GateWriter,
    MovePlan,
    PutGrant,
    PutRequest,
    Role,
    RoomWanted,
    SegmentMounted,
    SegmentStats,
    SessionInfo,
    SessionStats,
    SpillPlan,
    StatsReply,
    Ticket,
)
from .demoting import Demoting
from .integrity import check_core
from .jobs import SLICE, Job
from .lending import Lending
from .reading import PackedReply, Reading
from .removal import Removal
from .slabs import FREE, PROCESSING, QUARANTINED, USED
from .spilling import Spilling
from .state import Instruction, Session, State
from .writing import Writing, check_request


class RemovalReply(NamedTuple):
    """What `remove` and `clear` did at once, and what must still happen before the answer may go out."""

    removed: int
    tokens: list[int]
    """Wait until `outstanding(tokens)` is false, or for a bounded time."""


class Directory:
    """All state of one manager. Not thread-safe. Every verb takes the client id of a living session and raises
    `ManagerRefusedError` without one, `ProtocolError` for arguments that no conforming client sends; nothing has changed
    then. Keys are 16-byte digests."""

    def __init__(
        self,
        config: ManagerConfig | None = None,
        *,
        epoch: int,
        now: float = 0.0,
        first_segment: int = 1,
        slice_size: int = SLICE,
    ) -> None:
        """`epoch`: even, above every generation that an earlier manager gave out (nanoseconds since 1970). `first_segment`:
        number of the first segment (`random_first_segment`). `slice_size`: slots or keys that `work` goes through in a call."""
        config = config if config is not None else ManagerConfig()
        self._core = core = State(config, epoch + (epoch & 1), first_segment, slice_size)
        self._reading = Reading(core)
        self._moves = Demoting(core)
        self._spills = Spilling(core)
        self._puts = Writing(core, self._moves)
        self._removal = Removal(core)
        self._lending = Lending(core, self._puts, self._removal)
        self._started = now

    @property
    def epoch(self) -> int:
        return self._core.epoch

    # Sessions

    def open_session(
        self, client: bytes, name: str, role: Role, now: float, *, host: str = "", remote: bool = False
    ) -> SessionInfo:
        """Hello: the client states that it has no writes in flight. Ends an older session of the same client id first.
        Instructs to send it the mounted segments. `host`: its `SegmentInfo.host`; chunks on others are present for it only if
        they can be read there with a transfer engine and it has one (`remote`). Without a host it sees everything."""
        if len(client) != DIGEST_BYTES:
            raise ProtocolError(f"hello: a client id is {DIGEST_BYTES} bytes, got {len(client)}")
        core = self._core
        if client in core.sessions:
            self.close_session(client, now, goodbye=False)
        self._puts.writer_idle(client)
        self._lending.writer_idle(client)
        core.sessions[client] = Session(client, name, role, now, host, remote)
        core.counters.sessions += 1
        for segment in core.allocator.segments.values():
            core.push(client, SegmentMounted(info=segment.info))
        return SessionInfo(
            epoch=core.epoch,
            heartbeat_interval=core.config.heartbeat_interval,
            session_timeout=core.config.session_timeout,
        )

    def close_session(self, client: bytes, now: float, *, goodbye: bool = False) -> None:
        """The connection is gone, or (`goodbye`) the client said that it stops and has nothing in flight. Idempotent."""
        core = self._core
        if core.sessions.pop(client, None) is None:
            return
        core.unpinned(core.leases.drop_client(client))
        if goodbye:
            self._puts.writer_idle(client)
            self._lending.writer_idle(client)
        self._lending.lender_gone(client, goodbye=goodbye)
        if not goodbye:
            self._lending.writer_lost(client)

    def heartbeat(self, client: bytes, now: float) -> None:
        """A sign of life. So is every other call."""
        self._core.session(client, now)

    def has_session(self, client: bytes) -> bool:
        return client in self._core.sessions

    def tick(self, now: float) -> None:
        """Everything that is due: sessions, leases, tickets, quarantines."""
        core = self._core
        core.now = now
        core.tick_clock(now)
        # The same sum as in `next_deadline`: rounding must not leave it due for ever.
        timeout = core.config.session_timeout
        for session in [session for session in core.sessions.values() if session.seen + timeout <= now]:
            core.counters.session_timeouts += 1
            self.close_session(session.client, now, goodbye=False)
            core.outbox.append(Instruction(session.client, None))
        for lease in core.leases.expired(now):
            core.counters.lease_expiries += 1
            core.unpinned(core.leases.drop(lease.number, lease.client))
        self._puts.expire(now)
        core.wiping.count()  # forgets what nobody asks about any more

    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the latest; None: never, as things stand. O(sessions)."""
        core = self._core
        times = [core.leases.next_expiry(), core.writes.next_deadline()]
        if core.sessions:
            times.append(min(session.seen for session in core.sessions.values()) + core.config.session_timeout)
        return min((time for time in times if time is not None), default=None)

    def take_instructions(self) -> list[Instruction]:
        """What to send, in order; empties the outbox."""
        instructions, self._core.outbox = self._core.outbox, []
        return instructions

    @property
    def has_work(self) -> bool:
        """Whether jobs are under way: call `work` soon, and again and again, with everybody else's calls in between."""
        return bool(self._core.jobs)

    def work(self, now: float) -> None:
        """Do one slice of one of the jobs under way, below a millisecond or so."""
        self._core.now = now
        self._core.jobs.step()

    # Reading

    def lookup(self, client: bytes, keys: Sequence[bytes], now: float) -> int:
        """See `Manager.lookup`."""
        return self._reading.lookup(self._core.session(client, now), keys, now)

    def acquire(self, client: bytes, keys: Sequence[bytes], shard: int, lease: int, now: float) -> AcquireReply:
        """See `Manager.acquire`. `lease` 0: a new one."""
        return self._reading.acquire(self._core.session(client, now), keys, shard, lease, now).unpack()

    def acquire_packed(self, client: bytes, keys: Sequence[bytes], shard: int, lease: int, now: float) -> PackedReply:
        """As `acquire`, with the locations as bytes that lie ready. Raises `ProtocolError` for a negative shard."""
        return self._reading.acquire(self._core.session(client, now), keys, shard, lease, now)

    def release(self, client: bytes, lease: int, now: float) -> None:
        """See `Manager.release`."""
        self._reading.release(self._core.session(client, now), lease)

    def tiers(self, client: bytes, keys: Sequence[bytes], now: float) -> list[int]:
        """See `Manager.tiers`."""
        return self.begin_tiers(client, keys, now).finish()

    def begin_tiers(self, client: bytes, keys: Sequence[bytes], now: float) -> Job[list[int]]:
        """`tiers` as a job for `work`."""
        return self._core.jobs.begin(self._reading.tiers(self._core.session(client, now), keys))

    # Writing

    def put_start(self, client: bytes, request: PutRequest, now: float) -> list[PutGrant]:
        """See `Manager.put_start`. `exists` also when the writer cannot read the copy that exists, on another host: one
        copy of a chunk is all that the pool keeps. May instruct to ask the writer for room."""
        return self.begin_put_start(client, request, now).finish()

    def begin_put_start(self, client: bytes, request: PutRequest, now: float) -> Job[list[PutGrant]]:
        """`put_start` as a job for `work`."""
        session = self._core.session(client, now)
        check_request(request)
        return self._core.jobs.begin(self._put_start(session, request))

    def _put_start(self, session: Session, request: PutRequest) -> Generator[None, None, list[PutGrant]]:
        core = self._core
        grants = yield from self._puts.start(session.client, request)
        memory = core.allocator.hosts.get(session.host) if session.host and session.role == "engine" else None
        if memory is not None and memory.wants_room(core.config.high_watermark, core.now):
            core.push(session.client, RoomWanted())
        return grants

    def put_end(self, client: bytes, tickets: Sequence[Ticket], now: float) -> list[bool]:
        """See `Manager.put_end`. Idempotent."""
        self._core.session(client, now)
        return self._puts.end(client, tickets, now)

    def put_revoke(self, client: bytes, tickets: Sequence[Ticket], now: float) -> None:
        """See `Manager.put_revoke`."""
        self._core.session(client, now)
        self._puts.revoke(client, tickets)

    # Making room

    def demote(self, client: bytes, nbytes: int, avoid: Sequence[int], now: float) -> MovePlan:
        """See `Manager.demote`."""
        return self._moves.plan(self._core.session(client, now), _plan_bytes(nbytes), frozenset(avoid), now)

    def spill(self, client: bytes, nbytes: int, avoid: Sequence[int], now: float) -> SpillPlan:
        """See `Manager.spill`."""
        return self._spills.plan(self._core.session(client, now), _plan_bytes(nbytes), frozenset(avoid), now)

    def spilled(self, client: bytes, lease: int, keys: Sequence[bytes], now: float) -> None:
        """See `Manager.spilled`. Also counts for keys that the lease does not cover, and when it has ended."""
        self._core.session(client, now)
        self._spills.done(client, lease, keys, now)

    # Removing

    def remove(self, client: bytes, keys: Sequence[bytes], now: float) -> RemovalReply:
        """See `Manager.remove`; gone at once here, and for good when the tokens are no longer outstanding."""
        return RemovalReply(*self.begin_remove(client, keys, now).finish())

    def begin_remove(self, client: bytes, keys: Sequence[bytes], now: float) -> Job[tuple[int, list[int]]]:
        """`remove` as a job for `work`: the parts of a `RemovalReply`."""
        self._core.session(client, now)
        return self._core.jobs.begin(self._removal.remove(keys))

    def clear(self, client: bytes, namespace: bytes, now: float) -> RemovalReply:
        """See `Manager.clear`. Writes under way are not affected. O(chunks)."""
        return RemovalReply(*self.begin_clear(client, namespace, now).finish())

    def begin_clear(self, client: bytes, namespace: bytes, now: float) -> Job[tuple[int, list[int]]]:
        """`clear` as a job for `work`: the parts of a `RemovalReply`. What is stored meanwhile may stay."""
        self._core.session(client, now)
        return self._core.jobs.begin(self._removal.clear(namespace))

    def outstanding(self, tokens: Iterable[int]) -> bool:
        """Whether a lender still has to zero headers for any of these tokens. False once its session is gone."""
        return any(self._core.wiping.outstanding(token) for token in tokens)

    def wiped(self, client: bytes, token: int, now: float) -> None:
        """See `Manager.wiped`."""
        self._core.session(client, now)
        self._lending.wiped(client, token)

    # Lending

    def mount(
        self, client: bytes, info: SegmentInfo, inventory: Sequence[SlabInventory], now: float, gate: GateReport | None = None
    ) -> int:
        """See `Manager.mount`. O(slots)."""
        return self.begin_mount(client, info, inventory, now, gate).finish()

    def begin_mount(
        self, client: bytes, info: SegmentInfo, inventory: Sequence[SlabInventory], now: float, gate: GateReport | None = None
    ) -> Job[int]:
        """`mount` as a job for `work`: it is mounted at once, and its chunks come bit by bit. Its result raises
        `ManagerRefusedError` when the segment is mounted again or goes before the end."""
        self._core.session(client, now)
        return self._lending.mount(client, info, inventory, gate or GateReport())

    def writers_left(self, client: bytes, uuid: bytes, writers: Sequence[GateWriter], now: float) -> None:
        """See `Manager.writers_left`."""
        self._core.session(client, now)
        self._lending.writers_left(client, uuid, writers)

    def unmount(self, client: bytes, uuid: bytes, now: float) -> None:
        """See `Manager.unmount`."""
        self._core.session(client, now)
        self._lending.unmount(client, uuid)

    def add_slabs(self, client: bytes, uuid: bytes, slabs: Sequence[SlabInfo], now: float) -> None:
        """See `Manager.add_slabs`."""
        self._core.session(client, now)
        self._lending.add_slabs(client, uuid, slabs)

    def drop_slabs(self, client: bytes, uuid: bytes, nbytes: int, now: float) -> list[int]:
        """See `Manager.drop_slabs`."""
        self._core.session(client, now)
        return self._lending.drop_slabs(client, uuid, nbytes, now)

    def importer_gone(self, client: bytes, uuid: bytes, importer: bytes, now: float) -> None:
        """See `Manager.importer_gone`."""
        self._core.session(client, now)
        self._lending.importer_gone(client, uuid, importer, now)

    def request_resize(self, client: bytes, uuid: bytes, nbytes: int, now: float) -> None:
        """See `Manager.request_resize`."""
        self._core.session(client, now)
        self._lending.request_resize(uuid, nbytes)

    # Looking at it

    def segments(self) -> list[SegmentInfo]:
        return [segment.info for segment in self._core.allocator.segments.values()]

    def stats(self, now: float) -> StatsReply:
        """Counters and gauges. O(slabs + leases + sessions)."""
        core = self._core
        segments: list[SegmentStats] = []
        for segment in core.allocator.segments.values():
            counts, used, unformatted = core.allocator.totals(segment)
            segments.append(
                SegmentStats(
                    info=segment.info,
                    slots_free=counts[FREE],
                    slots_used=counts[USED],
                    slots_processing=counts[PROCESSING],
                    slots_quarantined=counts[QUARANTINED],
                    bytes_used=used,
                    slabs_unformatted=unformatted,
                )
            )
        sessions = [
            SessionStats(
                client=session.client,
                name=session.name,
                role=session.role,
                leases=core.leases.count(session.client),
                writes=core.writes.count(session.client),
                age=now - session.opened,
            )
            for session in core.sessions.values()
        ]
        return StatsReply(
            epoch=core.epoch,
            uptime=now - self._started,
            counters=asdict(core.counters),
            gauges=self._gauges(segments),
            segments=segments,
            sessions=sessions,
        )

    def _gauges(self, segments: list[SegmentStats]) -> dict[str, int]:
        core = self._core
        return {
            "chunks": len(core.chunks.visible),
            "chunks_pending": len(core.chunks.pending),
            "leases": len(core.leases.leases),
            "sessions": len(core.sessions),
            "segments": len(segments),
            "wipes_outstanding": core.wiping.count(),
            "slots_free": sum(segment.slots_free for segment in segments),
            "slots_used": sum(segment.slots_used for segment in segments),
            "slots_processing": sum(segment.slots_processing for segment in segments),
            "slots_quarantined": sum(segment.slots_quarantined for segment in segments),
            "bytes_capacity": sum(segment.info.nbytes for segment in segments),
            "bytes_used": sum(segment.bytes_used for segment in segments),
        }

    def check_integrity(self) -> None:
        """Raises `IntegrityError` naming the rule (I2-I6, I9, I10) that does not hold. O(everything)."""
        check_core(self._core, list(self._lending.away_slabs()))


def random_first_segment() -> int:
    """A number to begin with, so that a segment's number in one epoch means nothing in another: whoever still holds the
    segments of an earlier manager finds none under a number of this one. Leaves as many numbers above as below, within u32."""
    return 2**16 + secrets.randbelow(2**31)


def _plan_bytes(nbytes: int) -> int:
    if nbytes < 0:
        raise ProtocolError(f"demote, spill: {nbytes} bytes")
    return nbytes
