"""`Manager`: the manager as everybody uses it, whatever carries the calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..errors import VCacheError
from ..segment.slots import SegmentInfo, SlabInfo, SlabInventory
from .api import (
    Acquire,
    AcquireReply,
    AddSlabs,
    Clear,
    Demote,
    DropSlabs,
    GateReport,
    GateWriter,
    ImporterGone,
    Listener,
    Lookup,
    Mount,
    MovePlan,
    PlanSpill,
    Promote,
    PutEnd,
    PutGrant,
    PutRequest,
    PutRevoke,
    PutStart,
    Release,
    Remove,
    RequestResize,
    Segments,
    Spilled,
    SpillPlan,
    Stats,
    StatsReply,
    Story,
    StoryEntry,
    Ticket,
    Tiers,
    UndoneSlots,
    Unmount,
    Wiped,
    WritersLeft,
)
from .transport import Transport

logger = logging.getLogger("vcache.manager")


class Manager:
    """The verbs of `api.py`, each as a method; what a verb does and answers is said there. Thread-safe.

    Every call blocks at most for its deadline, then raises `DeadlineExceededError`; without a session it raises
    `ManagerUnavailableError` at once. What a reply grants that comes after its caller had given up is given back here.
    """

    def __init__(self, transport: Transport) -> None:
        """`transport` is closed by `close`."""
        self.transport = transport

    # Session: see `Transport`.

    @property
    def client_id(self) -> bytes:
        return self.transport.client_id

    @property
    def epoch(self) -> int:
        return self.transport.epoch

    @property
    def last_failure(self) -> VCacheError | None:
        return self.transport.last_failure

    def wait_connected(self, timeout: float) -> bool:
        return self.transport.wait_connected(timeout)

    def subscribe(self, listener: Listener) -> None:
        self.transport.subscribe(listener)

    def set_write_gate(self, wait_idle: Callable[[float], bool]) -> None:
        self.transport.set_write_gate(wait_idle)

    def close(self) -> None:
        self.transport.close()

    # Reading

    def lookup(self, keys: Sequence[bytes]) -> int:
        """The keys must not be changed afterwards, here and in `acquire`: a manager in this process keeps them in its log."""
        return self.transport.call(Lookup(keys))

    def acquire(self, keys: Sequence[bytes], shard: int = 0, *, lease: int = 0, within: float | None = None) -> AcquireReply:
        """`within`: seconds, where they are fewer than the deadline."""
        return self.transport.call(Acquire(keys, shard, lease), None if lease else self._late_lease, within)

    def release(self, lease: int) -> None:
        """Does not wait for an answer, and returns quietly without a session: its end has ended the lease."""
        if lease:
            self.transport.tell(Release(lease))

    def tiers(self, keys: Sequence[bytes]) -> list[int]:
        return self.transport.call(Tiers(list(keys)))

    # Writing

    def put_start(self, request: PutRequest) -> list[PutGrant]:
        return self.transport.call(PutStart(request), lambda grants: self._late_grants(request, grants))

    def put_end(self, tickets: Sequence[Ticket]) -> list[bool]:
        return self.transport.call(PutEnd(list(tickets)))

    def put_revoke(self, tickets: Sequence[Ticket]) -> None:
        self.transport.call(PutRevoke(list(tickets)))

    # Making room

    def demote(self, nbytes: int, avoid: Sequence[int] = ()) -> MovePlan:
        return self.transport.call(Demote(nbytes, list(avoid)), self._late_moves)

    def promote(self, nbytes: int, avoid: Sequence[int] = ()) -> MovePlan:
        return self.transport.call(Promote(nbytes, list(avoid)), self._late_moves)

    def spill(self, nbytes: int, avoid: Sequence[int] = ()) -> SpillPlan:
        return self.transport.call(PlanSpill(nbytes, list(avoid)), self._late_lease)

    def spilled(self, lease: int, keys: Sequence[bytes]) -> None:
        self.transport.call(Spilled(lease, list(keys)))

    # Removing

    def remove(self, keys: Sequence[bytes]) -> int:
        return self.transport.call(Remove(list(keys)))

    def clear(self, namespace: bytes = b"") -> int:
        return self.transport.call(Clear(namespace))

    # Lending

    def mount(self, info: SegmentInfo, inventory: Sequence[SlabInventory] = (), gate: GateReport | None = None) -> int:
        return self.transport.call(Mount(info, list(inventory), gate or GateReport()))

    def writers_left(self, uuid: bytes, writers: Sequence[GateWriter], undone: Sequence[UndoneSlots] = ()) -> None:
        self.transport.call(WritersLeft(uuid, list(writers), list(undone)))

    def unmount(self, uuid: bytes) -> None:
        self.transport.call(Unmount(uuid))

    def add_slabs(self, uuid: bytes, slabs: Sequence[SlabInfo]) -> None:
        self.transport.call(AddSlabs(uuid, list(slabs)))

    def drop_slabs(self, uuid: bytes, nbytes: int) -> list[int]:
        return self.transport.call(DropSlabs(uuid, nbytes))

    def importer_gone(self, uuid: bytes, client: bytes) -> None:
        self.transport.call(ImporterGone(uuid, client))

    def request_resize(self, uuid: bytes, nbytes: int) -> None:
        self.transport.call(RequestResize(uuid, nbytes))

    def wiped(self, token: int) -> None:
        self.transport.call(Wiped(token))

    # Looking at it

    def segments(self) -> list[SegmentInfo]:
        return self.transport.call(Segments())

    def stats(self) -> StatsReply:
        return self.transport.call(Stats())

    def story(self, key: bytes) -> list[StoryEntry]:
        return self.transport.call(Story(key))

    # Replies that come too late: what they grant would be held for nothing.

    def _late_lease(self, reply: AcquireReply | SpillPlan) -> None:
        self.release(reply.lease)

    def _late_grants(self, request: PutRequest, grants: list[PutGrant]) -> None:
        self._revoke_late(
            [
                Ticket(key, request.shard, grant.location.generation)
                for key, grant in zip(request.keys, grants, strict=True)
                if grant.location is not None
            ]
        )

    def _late_moves(self, plan: MovePlan) -> None:
        self._revoke_late(
            [Ticket(move.key, move.shard, move.grant.location.generation) for move in plan.moves if move.grant.location]
        )
        self.release(plan.lease)

    def _revoke_late(self, tickets: list[Ticket]) -> None:
        try:
            if tickets:
                self.put_revoke(tickets)
        except VCacheError as error:
            logger.debug("put_revoke of tickets that came too late: %s", error)
