"""The manager's heart: a pure state machine. Events in, replies and instructions out; no sockets, threads or clocks.

Who calls it serialises the calls, passes the time (seconds, any origin, never backwards) and the client id of the session,
carries out `take_instructions()` after every call, and calls `tick` no later than `next_deadline()`. A `Job` that a call
returns goes on bit by bit, by `work`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

from ...config import ManagerConfig
from ...errors import ProtocolError
from ...keys import DIGEST_BYTES
from ...segment.slots import SegmentInfo, SlotLocation
from ..api import (
    Acquire,
    AddSlabs,
    Clear,
    Demote,
    DropSlabs,
    Goodbye,
    Heartbeat,
    ImporterGone,
    InventoryPart,
    Lookup,
    Mount,
    Place,
    PlanSpill,
    Promote,
    PutEnd,
    PutRevoke,
    PutStart,
    Release,
    Remove,
    RequestResize,
    Role,
    SegmentMounted,
    Segments,
    SegmentStats,
    SessionInfo,
    SessionStats,
    Spilled,
    Stats,
    StatsReply,
    Story,
    StoryEntry,
    Tiers,
    Unmount,
    Verb,
    Wiped,
    WritersLeft,
)
from .demoting import Demoting
from .integrity import check_state
from .jobs import SLICE, Job
from .lending import Lending
from .log import NOTES
from .promoting import Promoting
from .reading import Reading
from .removal import Removal
from .slabs import FREE, PROCESSING, QUARANTINED, USED
from .spilling import Spilling
from .state import Instruction, Session, State
from .writing import Writing

V = TypeVar("V", bound=Verb[Any])

Handler = Callable[[Session, Any], object]


class Directory:
    """All state of one manager. Not thread-safe."""

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
        self._state = state = State(config, epoch + (epoch & 1), first_segment, slice_size)
        self._promoting = Promoting(state)
        self._reading = Reading(state, self._promoting)
        self._demoting = Demoting(state)
        self._spilling = Spilling(state)
        self._writing = Writing(state)
        self._removal = Removal(state)
        self._lending = Lending(state, self._writing, self._removal)
        self._handlers = {verb: (handler, NOTES.get(verb)) for verb, handler in self._table().items()}
        self._started = now
        self._session, self._log = state.session, state.log

    @property
    def epoch(self) -> int:
        return self._state.epoch

    # Sessions

    def open_session(
        self, client: bytes, name: str, role: Role, now: float, *, host: str = "", remote: bool = False
    ) -> SessionInfo:
        """Hello: the client states that it has no writes in flight. Ends an older session of the same client id first.
        Instructs to send it the mounted segments. `host`: its `SegmentInfo.host`; chunks on others are present for it only if
        they can be read there with a transfer engine and it has one (`remote`). Without a host it sees everything."""
        if len(client) != DIGEST_BYTES:
            raise ProtocolError(f"hello: a client id is {DIGEST_BYTES} bytes, got {len(client)}")
        state = self._state
        state.now = now
        if client in state.sessions:
            self.close_session(client, now, goodbye=False)
        self._writing.writer_idle(client)
        state.sessions[client] = Session(client, name, role, now, host, remote)
        state.counters.sessions += 1
        for segment in state.allocator.segments.values():
            state.push(client, SegmentMounted(info=segment.info))
        return SessionInfo(
            epoch=state.epoch,
            heartbeat_interval=state.config.heartbeat_interval,
            session_timeout=state.config.session_timeout,
        )

    def close_session(self, client: bytes, now: float, *, goodbye: bool = False) -> None:
        """The connection is gone, or (`goodbye`) the client said that it stops and has nothing in flight. Idempotent."""
        state = self._state
        if state.sessions.pop(client, None) is None:
            return
        state.now = now
        state.unleased(state.leases.drop_client(client))
        if goodbye:
            self._writing.writer_idle(client)
        self._lending.lender_gone(client, goodbye=goodbye)
        if not goodbye:
            self._lending.writer_lost(client)

    def heartbeat(self, client: bytes, now: float) -> None:
        """A sign of life, as every verb is. Raises `ManagerRefusedError` without a session."""
        self._state.session(client, now)

    def has_session(self, client: bytes) -> bool:
        return client in self._state.sessions

    def tick(self, now: float) -> None:
        """Everything that is due: sessions, leases, tickets, quarantines."""
        state = self._state
        state.now = now
        state.tick_clock(now)
        # The same sum as in `next_deadline`: rounding must not leave it due for ever.
        timeout = state.config.session_timeout
        for session in [session for session in state.sessions.values() if session.seen + timeout <= now]:
            state.counters.session_timeouts += 1
            self.close_session(session.client, now, goodbye=False)
            state.outbox.append(Instruction(session.client, None))
        for lease in state.leases.expired(now):
            state.counters.lease_expiries += 1
            state.unleased(state.leases.drop(lease.number, lease.client))
        self._writing.expire(now)
        state.wiping.count()  # forgets what nobody asks about any more

    def next_deadline(self) -> float | None:
        """When `tick` has something to do at the latest; None: never, as things stand. O(sessions)."""
        state = self._state
        times = [state.leases.next_expiry(), state.writes.next_deadline()]
        if state.sessions:
            times.append(min(session.seen for session in state.sessions.values()) + state.config.session_timeout)
        return min((time for time in times if time is not None), default=None)

    def take_instructions(self) -> list[Instruction]:
        """What to send, in order; empties the outbox."""
        instructions, self._state.outbox = self._state.outbox, []
        return instructions

    @property
    def has_work(self) -> bool:
        """Whether jobs are under way: call `work` soon, and again and again, with everybody else's calls in between."""
        return bool(self._state.jobs)

    def work(self, now: float) -> None:
        """Do one slice of one of the jobs under way, below a millisecond or so."""
        self._state.now = now
        self._state.jobs.step()

    # Verbs

    def handle(self, client: bytes, verb: Verb[Any], now: float) -> object:
        """Do what a client asks: the reply, or the `Job` whose result it will be. The log keeps the keys: they must not be
        changed afterwards.

        In place of their replies, `Acquire` gets a `PackedReply`, `Remove` and `Clear` a `RemovalReply`. Raises
        `ManagerRefusedError` without a session and for what a handler refuses, `ProtocolError` for what no conforming client
        asks; nothing has changed then, but that parts of an inventory are used up.
        """
        session, log = self._session(client, now), self._log
        handler, note = self._handlers[type(verb)]
        if note is None:
            return handler(session, verb)
        number, reply = log.number, handler(session, verb)
        note(log, number, now, session.name, verb, reply)
        return reply

    def _table(self) -> dict[type[Verb[Any]], Handler]:
        """The handler of each verb."""
        reading, writing, lending = self._reading, self._writing, self._lending
        return {
            Lookup: reading.lookup,
            Acquire: reading.acquire,
            Release: reading.release,
            Tiers: self._job(reading.tiers),
            PutStart: self._job(writing.start),
            PutEnd: writing.end,
            PutRevoke: writing.revoke,
            Demote: self._demoting.plan,
            Promote: self._promoting.plan,
            PlanSpill: self._spilling.plan,
            Spilled: self._spilling.done,
            Remove: self._job(self._removal.remove),
            Clear: self._job(self._removal.clear),
            InventoryPart: lending.part,
            Mount: lending.mount,
            WritersLeft: lending.writers_left,
            Unmount: lending.unmount,
            AddSlabs: lending.add_slabs,
            DropSlabs: lending.drop_slabs,
            ImporterGone: lending.importer_gone,
            RequestResize: lending.request_resize,
            Wiped: lending.wiped,
            Segments: lambda session, verb: self.segments(),
            Stats: lambda session, verb: self.stats(session.seen),
            Story: lambda session, verb: self.story(verb.key, session.seen),
            Heartbeat: lambda session, verb: None,
            Goodbye: lambda session, verb: self.close_session(session.client, session.seen, goodbye=True),
        }

    def _job(self, steps: Callable[[Session, V], Generator[None, None, object]]) -> Callable[[Session, V], Job[object]]:
        return lambda session, verb: self._state.jobs.begin(steps(session, verb))

    def outstanding(self, tokens: Iterable[int]) -> bool:
        """Whether a lender still has to zero headers for any of these tokens. False once its session is gone."""
        return any(self._state.wiping.outstanding(token) for token in tokens)

    # Looking at it

    def story(self, key: bytes, now: float) -> list[StoryEntry]:
        """What the log knows of a chunk, the oldest first, and at last what there is of it now. Empty for a key of which
        nothing is known. O(log): some hundredths of a second."""
        state = self._state
        entries = [
            StoryEntry(
                ago=now - line.time,
                client=line.client,
                what=line.what,
                detail=line.detail,
                shard=line.shard,
                place=self._place(line.place) if line.place is not None else None,
            )
            for line in state.log.story(key)
        ]
        record = state.chunks.any(key)
        for shard, location in enumerate(record.places() if record is not None else ()):
            held = f"leased {record.leased} time(s)" if record is not None and record.leased else ""
            entries.append(StoryEntry(what="present", detail=held, place=self._place(location), shard=shard))
        if record is not None and key in state.chunks.pending:
            parts = state.chunks.pending[key]
            done = sum(part.state == USED for part in parts.parts.values())
            entries.append(StoryEntry(what="being written", detail=f"{done} of {parts.num_shards} shard(s) complete"))
        elif entries and not (record is not None and record.packed):
            entries.append(StoryEntry(what="absent"))
        return entries

    def _place(self, location: SlotLocation) -> Place:
        segment = self._state.allocator.segments.get(location.segment)
        tier = segment.info.tier if segment is not None else None
        return Place(tier, location.segment, location.slab, location.slot, location.generation)

    def segments(self) -> list[SegmentInfo]:
        return [segment.info for segment in self._state.allocator.segments.values()]

    def stats(self, now: float) -> StatsReply:
        """Counters and gauges. O(slabs + leases + sessions)."""
        state = self._state
        segments: list[SegmentStats] = []
        for segment in state.allocator.segments.values():
            counts, used, unformatted = state.allocator.totals(segment)
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
                leases=state.leases.count(session.client),
                writes=state.writes.count(session.client),
                age=now - session.opened,
            )
            for session in state.sessions.values()
        ]
        return StatsReply(
            epoch=state.epoch,
            uptime=now - self._started,
            counters=asdict(state.counters),
            gauges=self._gauges(segments),
            segments=segments,
            sessions=sessions,
        )

    def _gauges(self, segments: list[SegmentStats]) -> dict[str, int]:
        state = self._state
        return {
            "chunks": len(state.chunks.visible),
            "chunks_pending": len(state.chunks.pending),
            "leases": len(state.leases.leases),
            "sessions": len(state.sessions),
            "segments": len(segments),
            "wipes_outstanding": state.wiping.count(),
            "admission_selective": int(state.admission.selective),
            "slots_free": sum(segment.slots_free for segment in segments),
            "slots_used": sum(segment.slots_used for segment in segments),
            "slots_processing": sum(segment.slots_processing for segment in segments),
            "slots_quarantined": sum(segment.slots_quarantined for segment in segments),
            "bytes_capacity": sum(segment.info.nbytes for segment in segments),
            "bytes_used": sum(segment.bytes_used for segment in segments),
        }

    def check_integrity(self) -> None:
        """Raises `IntegrityError` naming the rule (I2-I6, I9, I10) that does not hold. O(everything)."""
        check_state(self._state, list(self._lending.away_slabs()))


def random_first_segment() -> int:
    """A number to begin with, so that a segment's number in one epoch means nothing in another: whoever still holds the
    segments of an earlier manager finds none under a number of this one. Leaves as many numbers above as below, within u32."""
    return 2**16 + secrets.randbelow(2**31)
