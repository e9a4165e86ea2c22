"""Moves chunks when the manager asks: cold ones from VRAM to host memory, the coldest to storage, hot ones up to free VRAM."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from ..errors import TRANSFER_ERRORS, ManagerError
from ..manager.api import Move, MovePlan, PromotionWanted, Push, RoomWanted, SessionInfo, Ticket
from ..metrics import EngineMetrics, Operation
from ..segment.gate import Passage
from ..segment.slot_protocol import SourceSlot, TargetSlot, copy_slot
from ..segment.slots import SlabHeader, Tier
from .pace import Pace
from .pool import ChunkPool
from .storage_writer import Spiller

logger = logging.getLogger("vcache.room")

PLAN_BYTES = 256 * 2**20
"""Payload of one plan at most: what is moved becomes visible this often, and the sources' lease is held no longer."""

PATIENCE = 0.25
"""Seconds that a plan of moves waits for loads at most: loads without end must not leave the pool without room, and the
lease, tickets and shut write gate of a plan must not be held for long."""
_PLANS_PER_SECOND = 4
"""At the limit: what moves within one plan goes as fast as it can, so a plan must be short beside a second."""


_Outcome = Literal["more", "nothing", "stuck"]
"""Of one plan: it got somewhere, so ask for another; there was nothing to do; it got nowhere, so would the next one."""


class _Direction(NamedTuple):
    """Where moves go, and what they are called."""

    operation: Operation
    tier: Tier
    moved: str
    refused: str


_DOWN = _Direction("demote", "dram", "demoted_chunks", "demote_refused")
_UP = _Direction("promote", "vram", "promoted_chunks", "promote_refused")


class RoomMaker:
    """Carries out the manager's plans in a thread that sleeps until `RoomWanted` or `PromotionWanted` is pushed, and then works
    until there is nothing more to do, or nothing that it can do. Room goes first. A `Listener` of the manager. A put or a
    retrieve never waits for it."""

    def __init__(
        self,
        pool: ChunkPool,
        metrics: EngineMetrics,
        *,
        demote: bool,
        promote: bool,
        spiller: Spiller | None,
        plan_bytes: int = PLAN_BYTES,
        rate: int = 0,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] | None = None,
    ) -> None:
        """`demote`: copy chunks to host memory. `promote`: copy them to VRAM. `spiller`: writes them to storage; None: nobody
        does. `rate`: bytes a second that are moved at most, 0 for no limit. `pause`: waits so many seconds of `clock`, or until
        `close`. Subscribes to the manager of `pool`; close it before the pool's segments and the spiller."""
        self._pool = pool
        self._metrics = metrics
        self._demotes = demote
        self._promotes = promote
        self._spiller = spiller
        self._plan_bytes = min(plan_bytes, max(1, rate // _PLANS_PER_SECOND)) if rate else plan_bytes
        self._clock = clock
        self._pause = pause or self._wait_or_close
        self._pace = Pace(rate, clock(), 1 / _PLANS_PER_SECOND)
        self._changed = threading.Condition()
        self._room_wanted = False
        self._promotion_wanted = False
        self._busy = False
        self._closed = False
        self._writing = threading.Lock()
        """Held while slots are written."""
        self._thread = threading.Thread(target=self._run, name="vcache-room-maker", daemon=True)
        self._thread.start()
        pool.manager.subscribe(self)

    def on_session(self, session: SessionInfo) -> None:
        """A manager that wants room says so by itself."""

    def on_disconnect(self) -> None:
        """The next call of the manager fails, which ends a round."""

    def on_push(self, push: Push) -> None:
        if isinstance(push, RoomWanted | PromotionWanted):
            with self._changed:
                if isinstance(push, RoomWanted):
                    self._room_wanted = True
                else:
                    self._promotion_wanted = self._promotes
                self._changed.notify_all()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Block until it sleeps and no wish is left; False on timeout (seconds)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._wanted() and not self._busy, timeout)

    def close(self, timeout: float) -> None:
        """Finish the slot under way, then stop. Waits at most `timeout` seconds for what else is under way (a call of the
        manager, a write to storage), but for a slot as long as it takes: afterwards nothing is written. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._writing:
            pass

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wanted() or self._closed)
                if self._closed:
                    return
                self._busy, room = True, self._room_wanted
                if room:
                    self._room_wanted = False
                else:
                    self._promotion_wanted = False
            try:
                if room:
                    self._make_room()
                else:
                    self._fill_room()
            except ManagerError as error:
                self._metrics.count("manager_errors")
                logger.debug("nothing more is moved: %s", error)
            except TRANSFER_ERRORS as error:
                self._metrics.count("transfer_errors")
                logger.warning("nothing more is moved: %s", error)

    def _wanted(self) -> bool:
        return self._room_wanted or self._promotion_wanted

    def _fill_room(self) -> None:
        """Carry out plans of promotions until they get nowhere, or room is wanted: the manager asks again."""
        while not self._closed and not self._room_wanted and self._move_some(_UP) == "more":
            pass

    def _make_room(self) -> None:
        """Carry out plans of both kinds, until neither gets anywhere."""
        spiller, demotes = self._spiller, self._demotes
        spilled: _Outcome = "nothing"
        demoted: _Outcome = "nothing"
        while not self._closed:
            # In turns, and storage first: what is demoted may push the coldest out of host memory.
            if spiller is not None:
                spilled = self._spill_some(spiller)
                spiller = None if spilled == "stuck" else spiller
            if demotes and not self._closed:
                demoted = self._move_some(_DOWN)
                demotes = demoted != "stuck"
            if "more" not in (spilled, demoted):
                return

    # -- demote: VRAM to host memory; promote: back ---------------------------------------------------------------------

    def _move_some(self, way: _Direction) -> _Outcome:
        """Carry out one plan of moves: copy, publish, give the lease on the sources back."""
        manager, avoid = self._pool.manager, self._pool.segments.unreachable()
        # Before anything is leased or the write gate is shut.
        if (delay := self._pace.delay(self._clock())) > 0:
            self._pause(delay)
        patience = self._give_way(PATIENCE)
        if self._closed:
            return "stuck"
        with self._writing, self._pool.writing():
            began, epoch = time.perf_counter(), manager.epoch
            plan = self._plan(way, avoid)
            if not plan.lease:
                return "nothing"
            try:
                copied = self._copy(plan.moves, epoch, patience)
                moved = self._publish(plan.moves, copied)
            finally:
                self._pool.release(plan.lease)
        self._metrics.count(way.moved, len(moved))
        self._metrics.count(way.refused, len(plan.moves) - len(moved))
        if moved:
            nbytes = sum(copied[move.key, move.shard] for move in moved)
            self._metrics.observe(way.operation, way.tier, time.perf_counter() - began, nbytes)
        return "more" if moved else "stuck"

    def _plan(self, way: _Direction, avoid: Sequence[int]) -> MovePlan:
        manager = self._pool.manager
        return (manager.demote if way is _DOWN else manager.promote)(self._plan_bytes, avoid)

    def _give_way(self, patience: float) -> float:
        """Wait until this engine loads nothing, at most `patience` seconds; what is left of them."""
        if patience <= 0 or self._pool.wait_loads(0):
            return patience
        began = time.monotonic()
        self._pool.wait_loads(patience)
        return patience - (time.monotonic() - began)

    def _wait_or_close(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _copy(self, moves: Sequence[Move], epoch: int, patience: float) -> dict[tuple[bytes, int], int]:
        """Copy shards, one by one; the payload bytes of each that was. Waits for loads before each, `patience` seconds in
        all."""
        copied: dict[tuple[bytes, int], int] = {}
        for move in moves:
            patience = self._give_way(patience)
            if self._closed or self._pool.manager.epoch != epoch:
                # A manager that is gone cannot be told, and its successor cannot know of writes that have not begun.
                break
            nbytes = self._copy_one(move)
            self._pace.moved(nbytes, self._clock())
            if nbytes:
                copied[move.key, move.shard] = nbytes
        return copied

    def _copy_one(self, move: Move) -> int:
        """Copy one shard, inside the gate of its new slot; its payload bytes, 0 when it was refused or failed."""
        segments, grant = self._pool.segments, move.grant
        if grant.location is None:
            return 0
        pinned = []
        passage = Passage()
        try:
            for location in (move.source, grant.location):
                slot = segments.pin(location)
                if slot is None:
                    self._metrics.count("unreachable")
                    return 0
                pinned.append(slot)
            source, target = pinned
            if not passage.admits(target.slab, grant.fence):
                self._metrics.count("put_lapsed")
                return 0
            slab = SlabHeader(grant.format_generation, grant.location.slot_bytes, grant.slots).pack()
            return copy_slot(
                segments,
                SourceSlot(source, move.source, move.key, move.shard),
                TargetSlot(target, grant.location, slab),
                self._pool.manager.client_id,
            )
        except TRANSFER_ERRORS as error:
            self._metrics.count("transfer_errors")
            logger.warning("a chunk stays where it is, its copy failed: %s", error)
            return 0
        finally:
            passage.leave()
            for slot in pinned:
                segments.unpin(slot)

    def _publish(self, moves: Sequence[Move], copied: dict[tuple[bytes, int], int]) -> list[Move]:
        """End all tickets of a plan; the moves of which the manager took the copy."""
        good: list[tuple[Move, Ticket]] = []
        bad: list[Ticket] = []
        for move in moves:
            if move.grant.location is None:
                continue
            ticket = Ticket(move.key, move.shard, move.grant.location.generation)
            if (move.key, move.shard) in copied:
                good.append((move, ticket))
            else:
                bad.append(ticket)
        manager = self._pool.manager
        try:
            answers = manager.put_end([ticket for _, ticket in good]) if good else []
        finally:
            if bad:
                manager.put_revoke(bad)
        return [move for (move, _), ok in zip(good, answers, strict=True) if ok]

    # -- spill: memory to storage --------------------------------------------------------------------------------------

    def _spill_some(self, spiller: Spiller) -> _Outcome:
        """Carry out one plan of spills: write, and tell the manager what is in storage now."""
        manager = self._pool.manager
        plan = manager.spill(self._plan_bytes, self._pool.segments.unreachable())
        if not plan.lease:
            return "nothing"
        keys: list[bytes] = []
        try:
            keys, failed = spiller.write(plan.spills, lambda: self._closed)
        finally:
            manager.spilled(plan.lease, keys)
        return "more" if keys and not failed else "stuck"
